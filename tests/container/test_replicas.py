"""Replicas behind the balancer: upgraded and rolled back one after the other, with nobody noticing."""

import threading
from collections import Counter
from typing import Any

import pytest

from tests.container.conftest import prepare, write_tiny
from tests.container.deployment import Deployment

pytestmark = [pytest.mark.container, pytest.mark.timeout(1500)]

NUM_CLIENTS = 4
NUM_TURNS = 3
FEWEST_CONVERSATIONS = 50


@pytest.fixture(scope="module")
def replicas(deployment: Deployment) -> Deployment:
    """Two replicas with the tiny fusion."""
    if not (deployment.folder / ".env").exists():  # these tests alone
        prepare(deployment)
    write_tiny(deployment)
    deployment.set(SERVER_CPUS="1")
    deployment.follow("Replicas", 0)
    return deployment


@pytest.fixture(scope="module")
def is_new(replicas: Deployment) -> str:
    """Changes the code; Python that says whether it is the changed one."""
    return replicas.change_code()


class Conversations:
    """Clients that talk one conversation after the other until they are told to stop; each turn is tried once."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.num_done = 0
        self.failures: list[str] = []
        self.places: Counter[int] = Counter()
        """How many conversations were on how many replicas."""
        self._is_over = threading.Event()
        self._clients = [threading.Thread(target=self._talk, args=(number,)) for number in range(NUM_CLIENTS)]

    def __enter__(self) -> "Conversations":
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._is_over.set()
        for client in self._clients:
            client.join()

    def _talk(self, client_number: int) -> None:
        number = 0
        with self.deployment.client() as client:
            while not self._is_over.is_set():
                number += 1
                messages: list[Any] = [
                    {"role": "system", "content": f"You are guest {number} of table {client_number}."}
                ]
                places = set()
                for turn in range(NUM_TURNS):
                    messages.append({"role": "user", "content": f"Question {turn}?"})
                    try:
                        raw = client.chat.completions.with_raw_response.create(
                            model="tiny", messages=messages, max_tokens=12, temperature=0
                        )
                        messages.append({"role": "assistant", "content": raw.parse().choices[0].message.content})
                        places.add(raw.headers["x-replica"])
                    except Exception as error:
                        self.failures.append(repr(error))
                self.places[len(places)] += 1
                self.num_done += 1


@pytest.mark.parametrize(("number", "answer"), [(1, "True"), (2, "False")], ids=["upgrade", "back"])
def test_replicas_are_replaced_one_after_the_other_and_no_request_fails(
    replicas: Deployment, is_new: str, number: int, answer: str
) -> None:
    with Conversations(replicas) as conversations:
        replicas.wait(lambda: conversations.num_done >= NUM_CLIENTS, 120)
        replicas.follow("Replicas", number)
        fewest = max(FEWEST_CONVERSATIONS, conversations.num_done + NUM_CLIENTS)
        replicas.wait(lambda: conversations.num_done >= fewest, 300)
    print(f"{conversations.num_done} conversations, by replicas that they were on: {dict(conversations.places)}")
    assert conversations.failures == []
    assert [replicas.python(service, is_new).strip() for service in ("replica-1", "replica-2")] == [answer, answer]


def test_prometheus_finds_every_replica(replicas: Deployment) -> None:
    def all_up() -> bool:
        targets = replicas.ask_inside("prometheus", "http://127.0.0.1:9090/api/v1/targets")["data"]["activeTargets"]
        return [target["health"] for target in targets if target["labels"]["job"] == "ultrafuser"] == ["up", "up"]

    replicas.wait(all_up, 90)
