"""One server with monitoring, from nothing to its removal. The tests are steps: each goes on from the last one."""

import re
import threading
import time
from typing import Any

import openai
import pytest

from tests.container.conftest import prepare, write_tiny
from tests.container.deployment import PROJECT, Deployment, stand_ins

pytestmark = [pytest.mark.container, pytest.mark.timeout(1500)]

SMALL_LAYER_BYTES = 50_000_000
START_SECONDS = 300.0
"""A start on a machine that is busy with others; 15 to 130 s are usual."""

CORE = "VLLM::EngineCore"
KILL = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    command = (folder / "cmdline").read_bytes().replace(bytes(1), b" ").decode()
    if "{name}" in command and "python -c" not in command:
        os.kill(int(folder.name), signal.SIGKILL)
        print("killed", command)
"""


def test_the_image_is_built_and_the_server_answers(deployment: Deployment) -> None:
    prepare(deployment)
    deployment.set(SHUTDOWN_TIMEOUT="10")
    # The alert's five minutes would be waited for.
    rules = deployment.folder / "monitoring" / "rules.yml"
    text, count = re.subn(r"(alert: FusedDown\n(?: .+\n)+? +for:) 5m", r"\1 15s", rules.read_text())
    assert count == 1
    rules.write_text(text)
    deployment.follow("Start", 1)
    assert '"content":"' in deployment.follow("Start", 2)


def test_what_the_start_says_is_in_the_page(deployment: Deployment) -> None:
    known = r"ultrafuser \d|\[\d/4\] |      |vLLM \d|ready: |[\d-]+ [\d:,]+ INFO "
    page = (deployment.checkout / "docs" / "operations.md").read_text().partition("### What the start says")[2]
    explained = [row.partition("...")[0] for row in re.findall(r"`([^`]+)`", page.partition("\n### ")[0])]
    container = deployment.state("server-cpu")["Id"]  # not by compose, which adds codes for a terminal
    said = deployment.run(f"docker logs {container} 2>&1").splitlines()
    assert len(said) > 10
    others = [line for line in said if line and not re.match(known, line)]
    assert [line for line in others if not any(line.startswith(start) for start in explained)] == []


def test_clients_chat(deployment: Deployment) -> None:
    with deployment.client() as client:
        (model, *_) = client.models.list().data
        messages: Any = [{"role": "user", "content": "Say something."}]
        whole = client.chat.completions.create(model=model.id, messages=messages, max_tokens=8, temperature=0)
        stream = client.chat.completions.create(
            model=model.id, messages=messages, max_tokens=8, temperature=0, stream=True
        )
        assert whole.choices[0].message.content
        assert "".join(event.choices[0].delta.content or "" for event in stream) == whole.choices[0].message.content
    with deployment.client("wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_the_image_keeps_nothing_that_pip_was_told_in_secret(deployment: Deployment) -> None:
    image = deployment.state("server-cpu")["Config"]["Image"]
    assert "told-in-secret" not in deployment.run(
        f"docker image history --no-trunc {image}; docker image inspect {image}"
    )
    search = "grep -rls told-in-secret /etc /opt /run /src /tmp /usr/local /var /root || test ! -e /etc/pip.conf"
    assert deployment.run(f"docker run --rm --user 0 --entrypoint sh {image} -c '{search}'") == ""


def test_a_container_may_do_nothing_but_serve(deployment: Deployment) -> None:
    for service in ("server-cpu", "prometheus"):
        host = deployment.state(service)["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert "no-new-privileges:true" in host["SecurityOpt"]
    assert deployment.python("server-cpu", "import os; print(os.getuid(), os.getgid())").split() == ["10001", "0"]
    with pytest.raises(AssertionError, match="Read-only"):
        deployment.run("docker compose exec --no-TTY server-cpu touch /opt/here")


def test_another_user_of_group_0_may_go_on_with_the_volumes(deployment: Deployment) -> None:
    """Folders of the first start were 0755: its user alone could write there."""
    search = 'find /models /cache -type d ! -writable ! -perm 0700; test -n "$(ls /models/ultrafuser)"'
    run = "docker compose run --rm --no-deps --no-TTY --user 12345:0 server-cpu"
    assert deployment.run(f"{run} sh -c '{search}'") == ""


def test_prometheus_scrapes_and_complains_of_nothing(deployment: Deployment) -> None:
    deployment.follow("Watch", 0)

    def healthy() -> bool:
        targets = deployment.ask_inside("prometheus", "http://127.0.0.1:9090/api/v1/targets")["data"]["activeTargets"]
        return sorted((target["labels"]["job"], target["health"]) for target in targets) == [
            ("prometheus", "up"),
            ("ultrafuser", "up"),
        ]

    deployment.wait(healthy, 60)
    rules = deployment.ask_inside("prometheus", "http://127.0.0.1:9090/api/v1/rules")["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}
    time.sleep(35)  # Alertmanager's name is asked for every 30 s
    logs = deployment.run("docker compose logs --no-color prometheus")
    assert "ready to receive web requests" in logs
    assert re.findall(r".*level=(?:error|warn).*", logs) == []


def test_grafana_shows_the_dashboards(deployment: Deployment) -> None:
    if said := next((said for image, said in stand_ins().items() if "grafana" in image), None):
        pytest.skip(f"stand-in: {said}")
    password = (deployment.folder / "secrets" / "grafana_password").read_text().strip()
    found = deployment.run(
        f"curl --fail --silent --user admin:{password} http://127.0.0.1:3000/api/search?type=dash-db"
    )
    assert found.count('"uid"') == 2
    assert "install" not in deployment.run("docker compose logs --no-color grafana | grep -i plugin.*install || true")


@pytest.fixture(scope="module")
def alertmanager(deployment: Deployment) -> None:
    deployment.follow("Watch", 1)


def is_firing(deployment: Deployment, alert: str) -> bool:
    alerts = deployment.ask_inside("alertmanager", "http://127.0.0.1:9093/api/v2/alerts?active=true")
    return alert in {item["labels"]["alertname"] for item in alerts}


@pytest.mark.usefixtures("alertmanager")
def test_a_server_that_stops_finishes_what_it_can_and_an_alert_says_that_it_is_down(deployment: Deployment) -> None:
    assert not is_firing(deployment, "FusedDown")
    begun = threading.Barrier(3, timeout=60)
    ends: dict[int, str] = {}

    def ask(num_tokens: int) -> None:
        """Hear a stream to its end: the reason that its last event gives, or the error's code."""
        try:
            with deployment.client() as client:
                for number, event in enumerate(
                    client.chat.completions.create(
                        model=client.models.list().data[0].id,
                        messages=[{"role": "user", "content": "Count."}],
                        max_tokens=num_tokens,
                        stream=True,
                        extra_body={"ignore_eos": True},
                    )
                ):
                    if number == 1:
                        begun.wait()
                    ends[num_tokens] = event.choices[0].finish_reason or "cut off"
        except openai.APIError as error:
            ends[num_tokens] = str(error.code)

    streams = [threading.Thread(target=ask, args=(num_tokens,)) for num_tokens in (30, 1900)]
    for stream in streams:
        stream.start()
    begun.wait()
    deployment.run("docker compose stop server-cpu")
    for stream in streams:
        stream.join()
    assert ends == {30: "length", 1900: "shutting_down"}
    assert deployment.state("server-cpu")["State"]["ExitCode"] == 0
    deployment.wait(lambda: is_firing(deployment, "FusedDown"), 120)
    write_tiny(deployment)  # what follows shows nothing of the demo
    deployment.set(SERVER_CPUS="1")
    deployment.run("docker compose up --detach --wait")
    deployment.wait(lambda: not is_firing(deployment, "FusedDown"), 120)


def test_as_many_threads_compute_as_the_quota_pays_for(deployment: Deployment) -> None:
    """vLLM counts cores, and a quota hides none."""
    cores = int(deployment.python("server-cpu", "import os; print(len(os.sched_getaffinity(0)))"))
    assert cores > 1, "needs a machine of two cores or more"
    run = "docker compose run --rm --no-deps --no-TTY server-cpu"
    count = 'import os, torch; print(torch.get_num_threads(), os.environ["VLLM_CPU_OMP_THREADS_BIND"])'
    assert deployment.run(f"{run} python -c '{count}'").split() == ["1", "nobind"]
    show = 'import pathlib; print(*(path.parent.name for path in pathlib.Path("/proc").glob("[0-9]*/environ")))'
    assert deployment.python("server-cpu", show)
    environment = deployment.run(
        "docker compose exec --no-TTY server-cpu sh -c 'cat /proc/[0-9]*/environ' | tr '\\0' '\\n'"
    )
    assert set(re.findall(r"^OMP_NUM_THREADS=.*", environment, re.MULTILINE)) == {"OMP_NUM_THREADS=1"}


@pytest.mark.parametrize("name", ["ultrafuser serve", CORE], ids=["the server", "the engine core"])
def test_what_is_killed_is_started_again(deployment: Deployment, name: str) -> None:
    before = deployment.state("server-cpu")["RestartCount"]
    (deployment.folder / "kill.py").write_text(KILL.format(name=name))
    deployment.run("docker compose exec --no-TTY server-cpu python - <kill.py")

    def healthy_again() -> bool:
        state = deployment.state("server-cpu")
        return state["RestartCount"] > before and state["State"]["Health"]["Status"] == "healthy"

    deployment.wait(healthy_again, START_SECONDS)
    test_clients_chat(deployment)


def test_an_upgrade_and_the_way_back(deployment: Deployment) -> None:
    tell = deployment.change_code()
    old = deployment.state("server-cpu")
    deployment.follow("Change, upgrade, roll back", 0)
    new = deployment.state("server-cpu")
    assert deployment.python("server-cpu", tell).strip() == "True"
    test_clients_chat(deployment)
    first, second = (deployment.layers(state["Image"]) for state in (old, new))
    assert first != second
    assert first[:-1] == second[:-1]  # one layer is new, and it is small
    sizes = deployment.run(f"docker image history --format '{{{{.Size}}}}' --human=false {new['Image']}").split()
    assert 1_000_000 < int(next(size for size in sizes if size != "0")) < SMALL_LAYER_BYTES

    deployment.follow("Change, upgrade, roll back", 1)
    assert deployment.state("server-cpu")["Image"] == old["Image"]
    assert deployment.python("server-cpu", tell).strip() == "False"
    test_clients_chat(deployment)


def test_a_release_names_the_images_by_digest(deployment: Deployment) -> None:
    deployment.follow("Change, upgrade, roll back", 2)
    if found := stand_ins():
        pytest.skip(f"no registry has them: {', '.join(found)}")
    deployment.run("./lock-images.sh")
    deployment.follow("Change, upgrade, roll back", 2)


def test_a_stop_leaves_the_volumes_and_a_removal_nothing(deployment: Deployment) -> None:
    """`down` without profiles stopped nothing and said nothing."""
    containers, volumes = (
        f"docker {command} --quiet --filter label=com.docker.compose.project={PROJECT}"
        for command in ("ps --all", "volume ls")
    )
    deployment.follow("Stop", 0)
    test_clients_chat(deployment)
    deployment.run("sed -i 's/^COMPOSE_PROFILES=.*/COMPOSE_PROFILES=monitoring/' .env")
    assert len(deployment.run(volumes).split()) == 5
    deployment.follow("Stop", 1)
    assert deployment.run(containers) == ""
    assert deployment.run(volumes) == ""
