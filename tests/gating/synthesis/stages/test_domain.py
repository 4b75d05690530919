"""Domains are files: three are shipped, with the paper's sizes, and one more needs no code."""

import pytest
import yaml

from tests.gating.synthesis.model import serving_model
from tests.gating.synthesis.runs import records_of, run, settings_of, write_domain
from ultrafuser.gating.errors import DomainError
from ultrafuser.gating.synthesis.stages.domain import digest, domain_names, load_domain
from ultrafuser.gating.synthesis.stages.prompt import load_prompt, prompt_names


def test_the_shipped_domains_have_the_papers_sizes():
    assert domain_names() == ("code", "math", "text")
    sizes = {}
    for name in domain_names():
        domain = load_domain(name)
        sub_topics = domain.meta_topics * domain.sub_topics
        sizes[name] = (domain.meta_topics, sub_topics, sub_topics * domain.instructions * 5)
        assert domain.name == name
    assert sizes == {"text": (30, 1110, 99_900), "code": (21, 399, 99_750), "math": (21, 84, 110_040)}


def test_a_domain_of_ones_own_is_made_without_code(tmp_path):
    path = write_domain(tmp_path / "law.yaml", name="law", description="contracts and courts", language=None)
    with serving_model() as endpoint:
        run(settings_of(tmp_path / "out", endpoint, domain=(str(path),)))
    assert {record.domain for record in records_of(tmp_path / "out").values()} == {"law"}
    assert "contracts and courts" in endpoint.asked[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("name: [", "not YAML"),
        ("name: Law", "name: String should match"),
        ("- law", "file: Input should be"),
        ("name: law\nlenght: 3", "lenght|description: Field required"),
        (yaml.safe_dump({"name": "law", "limits": {"topic": 0}}), r"description|limits\.topic"),
    ],
)
def test_a_file_that_is_wrong_is_told_by_its_key(tmp_path, content, complaint):
    path = tmp_path / "law.yaml"
    path.write_text(content)
    with pytest.raises(DomainError, match=rf"law\.yaml: .*({complaint}).*; correct the file"):
        load_domain(str(path))


def test_a_name_that_does_not_exist_is_told_with_those_that_do():
    with pytest.raises(DomainError, match="laws: no such domain; give a YAML file, or one of code, math, text"):
        load_domain("laws")


def test_every_change_of_a_domain_is_seen():
    text = load_domain("text")
    assert digest(text) != digest(text.model_copy(update={"guidance": "Be brief."}))


def test_prompts_come_in_versions_and_the_newest_is_used():
    assert prompt_names() == (
        "complications", "instructions", "meta_topics", "related", "repair", "sub_topics", "user_turns"
    )  # fmt: skip
    assert load_prompt("related").identity == "related-1"
