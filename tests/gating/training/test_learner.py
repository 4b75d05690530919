"""The learner: reading rows one by one gives what reading the padded batch gives."""

import pytest
import torch

from ultrafuser.gating.data.batches import collate_rows
from ultrafuser.gating.training.building import build
from ultrafuser.gating.training.inputs import gather_inputs
from ultrafuser.gating.training.learner import FusedLearner, trainable_parameters


@pytest.mark.parametrize("changes", [{"stage": 1}, {"stage": 2}, {"stage": 2, "learn": "full"}], ids=str)
def test_rows_read_alone_give_the_loss_and_the_gradients_of_the_padded_batch(settings_of, changes):
    inputs = gather_inputs(settings_of(**changes))
    learner = build(inputs, torch.device("cpu"), lambda label, share: None, provenance={}).learner
    assert isinstance(learner, FusedLearner)
    assert learner.reads_rows_alone, "the default on a CPU"
    rows = sorted(inputs.rows.dataset, key=lambda row: row["length"])
    batch = collate_rows([rows[-1], *rows[:4]])
    shapes: list[torch.Size] = []
    for specialist in learner.specialists:
        specialist.get_submodule("model").register_forward_pre_hook(
            lambda _, __, options: shapes.append(options["input_ids"].shape), with_kwargs=True
        )
    found = []
    for is_alone in (True, False):
        learner.reads_rows_alone = is_alone
        learner.zero_grad()
        output = learner(**batch)
        output["loss"].backward()
        found.append((output, {name: tensor.grad for name, tensor in trainable_parameters(learner).items()}))
    assert len(shapes) == 3 * 5 + 3
    computed = [sum(rows * length for rows, length in own) for own in (shapes[:15], shapes[15:])]
    assert computed[0] == sum(int(mask_BT.sum()) for mask_BT in batch["attention_mask"]), "no padding is computed"
    assert computed[0] < 0.8 * computed[1]
    # The same float32 sums, over rows instead of a batch, in another order.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-5, atol=2e-5)
    largest = max(float(tensor.abs().max()) for tensor in found[1][1].values() if tensor is not None)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-4, atol=2e-6 * largest)
