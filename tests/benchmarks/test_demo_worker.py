"""What a worker process of the main job answers, asked within this process."""

import io
import json
import weakref

import pytest
import torch

from benchmarks.demo_options import DemoOptions
from benchmarks.demo_worker import Worker

SIZE = {"batch_size": 2, "seq_len": 8}


def ask(*commands, tokens=100, before=lambda worker: None, **options):
    """The events that a worker sends in answer to commands."""
    chosen = DemoOptions(
        **{"layers": 1, "width": 8, "heads": 1, "steps": 5, "seq_lens": (256,), **SIZE, **options}
    )
    lines = "".join(json.dumps(command) + "\n" for command in commands)
    text = torch.arange(tokens, dtype=torch.uint8)
    events = io.StringIO()
    worker = Worker("torch", chosen, text, io.StringIO(lines), events)
    before(worker)
    worker.serve()
    return [json.loads(line) for line in events.getvalue().splitlines()]


def losses(events):
    return [event["loss"] for event in events if event["event"] == "step"]


def test_turns_make_one_training():
    """In turns of 3 and 2 as in one of 5, and the first step, which compiles, changes nothing."""
    whole = ask({"do": "train", "steps": 5})
    turns = ask({"do": "first"}, {"do": "train", "steps": 3}, {"do": "train", "steps": 2})
    assert [e["event"] for e in turns] == ["ready", "done", *["step"] * 3, "done", *["step"] * 2, "done"]
    assert [e["step"] for e in turns if e["event"] == "step"] == [0, 1, 2, 3, 4]
    assert losses(turns) == losses(whole)


def test_first_steps_of_each_turn_are_not_timed():
    turns = ({"do": "train", "steps": 3}, {"do": "train", "steps": 2})
    timed = [e["timed"] for e in ask(*turns, untimed_per_turn=1) if e["event"] == "step"]
    assert timed == [False, True, True, False, True]
    assert all(e["timed"] for e in ask(*turns, untimed_per_turn=0) if e["event"] == "step")


def test_the_seed_decides_the_weights_and_the_batches():
    train = {"do": "train", "steps": 5}
    assert losses(ask(train, seed=1)) == losses(ask(train, seed=1))
    assert losses(ask(train, seed=1))[0] != losses(ask(train, seed=2))[0]


def test_stop_in_the_middle_ends_the_process():
    with pytest.raises(SystemExit) as left:
        ask({"do": "train", "steps": 2}, {"do": "stop"})
    assert left.value.code == 0


def test_extra_steps_are_timed_at_any_length_even_beyond_the_text():
    event = ask({"do": "steps", "steps": 2, "batch_size": 1, "seq_len": 256}, tokens=50)[-1]
    assert len(event["ms"]) == 2 and min(event["ms"]) > 0
    assert len(ask({"do": "steps", "steps": 2, **SIZE}, untimed_per_turn=3)[-1]["ms"]) == 2


def test_memory_is_the_state_and_what_a_step_adds():
    _, *_, event = ask({"do": "train", "steps": 5}, {"do": "memory", **SIZE})
    ready = ask()[0]
    state = 3 * 4 * ready["parameters"]  # weights and AdamW's two moments in float32
    assert state <= event["held"] < state + 4096  # and a step counter a parameter
    # At the end of the backward all gradients are there beside them.
    assert event["peak"] >= event["held"] + 4 * ready["parameters"]
    longer = ask({"do": "train", "steps": 5}, {"do": "memory", "batch_size": 2, "seq_len": 128})[-1]
    assert longer["held"] == event["held"]
    assert longer["peak"] > event["peak"]


def test_bfloat16_trains_under_autocast():
    single, half = (losses(ask({"do": "train", "steps": 5}, dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert half == pytest.approx(single, rel=1e-2)
    assert half != single


def test_out_of_memory_is_a_refusal_and_the_worker_goes_on():
    held, alive = [], []

    def exhaust(worker):
        kept = worker.more_steps

        def more_steps(batch_size, seq_len, steps):
            if seq_len > 100:
                activation = torch.ones(3)
                held.append(weakref.ref(activation))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
            return kept(batch_size, seq_len, steps)

        worker.more_steps = more_steps
        worker.rest = lambda: alive.append([reference() is not None for reference in held])

    long = {"do": "steps", "steps": 1, "batch_size": 1, "seq_len": 101}
    events = ask(long, {"do": "steps", "steps": 1, **SIZE}, before=exhaust)
    assert events[1] == {"event": "refused", "reason": "out of memory"}
    assert alive[0] == [False]  # else the other processes would run out of memory too
    assert events[2]["event"] == "done"
