"""Twenty clients at once on a running demo: no request is lost, and everyone gets the pictures they asked for."""

import itertools
import os
import statistics
import threading
import time
from dataclasses import dataclass, field

import pytest
from browser import running_demo
from gradio_client import Client


pytestmark = pytest.mark.load

SECONDS = float(os.environ.get("DIFFUSERS_EXT_LOAD_SECONDS", 120))
CLIENTS = 20
# What every request repeats is small, so that two cores answer many of them. The last is of two models at once.
COLUMNS = (
    [{"model": "film-mnist", "num_inference_steps": 4, "guidance": "classifier-free", "guidance_scale": 2.0}],
    [{"model": "dit-gqa-mnist", "num_inference_steps": 5, "scheduler": "DDIMScheduler"}],
    [{"model": "adm-mnist", "num_inference_steps": 3, "guidance": "classifier", "guidance_scale": 4.0}],
    [{"model": "dilated-mnist", "num_inference_steps": 3, "scheduler": "DDPMScheduler"}],
    [{"model": "film-mnist", "num_inference_steps": 3}, {"model": "dit-gqa-mnist", "num_inference_steps": 3}],
)


def settings_of(client: int, variant: int) -> dict:
    """Settings that no other client uses: the seed is its own; model and classes change from one to the next."""
    columns = COLUMNS[(client + variant) % len(COLUMNS)]
    labels = [] if columns[0]["model"] == "dilated-mnist" else [str(client % 10), str(variant)]
    return {"columns": columns, "class_labels": labels, "num_images": 1 + variant % 2, "seed": 1000 * client + variant}


def pictures(answer: dict) -> list[list[str]]:
    """Every column's images as data URIs, and what was wanted; a column that failed tells its error instead."""
    return [column["error"] or [column["images"], column["labels"]] for column in answer["columns"]]


@dataclass
class Log:
    """What the clients count together."""

    sent: int = 0
    seconds: list[float] = field(default_factory=list)  # of every answered request
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def keep_asking(client: Client, cases: list[tuple[dict, list]], log: Log, start: threading.Barrier, seconds: float):
    """Sends one request after another for `seconds`; every fourth one listens to the previews as well."""
    start.wait()
    end = time.monotonic() + seconds
    for number, (settings, expected) in enumerate(itertools.cycle(cases)):
        if time.monotonic() >= end:
            return
        with log.lock:
            log.sent += 1
        begin = time.monotonic()
        try:
            if number % 4 == 3:
                answer = list(client.submit(settings, api_name="/watch"))[-1]
            else:
                answer = client.predict(settings, api_name="/draw")
        except Exception as error:  # whatever it is, this request was lost
            with log.lock:
                log.problems.append(f"{settings}: {type(error).__name__}: {error}")
            continue
        with log.lock:
            log.seconds.append(time.monotonic() - begin)
            if answer["settings"]["seed"] != settings["seed"] or pictures(answer) != expected:
                log.problems.append(f"{settings}: other pictures than when drawn alone")


def test_twenty_clients_lose_nothing_and_mix_nothing(tmp_path, capsys):
    with running_demo(tmp_path / "demo.log") as demo:
        clients = [Client(demo.url, verbose=False, analytics_enabled=False) for _ in range(CLIENTS)]
        cases = []
        for number in range(CLIENTS):
            own = [settings_of(number, variant) for variant in range(2)]
            cases.append([(it, pictures(clients[number].predict(it, api_name="/draw"))) for it in own])
        alone = [str(expected) for own in cases for _, expected in own]
        assert all("data:image/png" in text for text in alone) and len(set(alone)) == len(alone)

        log, start, before = Log(), threading.Barrier(CLIENTS), demo.memory()
        threads = [
            threading.Thread(target=keep_asking, args=(client, own, log, start, SECONDS))
            for client, own in zip(clients, cases, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        growth = (demo.memory() - before) / 2**20

    answered = len(log.seconds)
    slowest = statistics.quantiles(log.seconds, n=20)[-1] if answered > 1 else float("nan")
    middle = statistics.median(log.seconds or [0])
    with capsys.disabled():
        print(
            f"\n{CLIENTS} clients in {SECONDS:g} s: {log.sent} requests, {answered} answers, {len(log.problems)} "
            f"problems; {answered / SECONDS:.1f} a second, {middle:.2f} s each, 95% in {slowest:.2f} s; "
            f"{growth:+.0f} MiB"
        )
    assert log.problems == []
    assert log.sent == answered >= 2 * CLIENTS
    assert growth < 300, "the server keeps what its clients asked for"
