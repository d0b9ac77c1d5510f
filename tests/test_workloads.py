"""The workloads, at sizes that take a second: both backends learn the same, on the kernels, and bad
options are told. How fast they are is not tested.
"""

import argparse
import datetime
import importlib.util
import json
import math

import pytest
import torch

import fusedrnn
from benchmarks import bench_samples
from benchmarks.workloads import (
    captioning,
    char_lm,
    classify,
    common,
    dialogue,
    forecast,
    gradient_flow,
    prefix_sum,
    scenes,
    seq2seq,
    video,
)

BACKENDS = ["torch.nn", "fusedrnn"]
TEXT = b"def add(a, b):\n    return a + b\n\nclass Stack(list):\n    push = list.append\n" * 20
SIZES = {"hidden": 12, "batch": 3, "chunk": 7, "seed": 5}


def check_alike(runs: dict[str, common.Run], calls: int) -> None:
    """Both backends trained alike, and fusedrnn's by `calls` calls of the kernels a step."""
    theirs, ours = runs["torch.nn"], runs["fusedrnn"]
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=0, atol=1e-4)
    steps = len(ours.losses)
    assert ours.counts["kernel_forward"] == ours.counts["kernel_backward"] == calls * steps > 0
    assert ours.counts["reference"] == ours.counts["torch"] == 0
    assert not any(theirs.counts.values())


def test_char_lm_trains_alike():
    """More steps than the text has chunks, so that the state is dropped once on the way."""
    steps = 2 * common.BLOCK + 55
    tokens = char_lm.encode(TEXT)
    assert steps > char_lm.Streams(tokens, SIZES["batch"], SIZES["chunk"]).chunks
    runs = char_lm.train(BACKENDS, tokens, steps=steps, **SIZES)
    theirs, ours = runs["torch.nn"], runs["fusedrnn"]
    assert type(theirs.model.recurrent) is torch.nn.LSTM
    assert type(ours.model.recurrent) is fusedrnn.LSTM
    assert len(theirs.losses) == len(ours.losses) == steps
    check_alike(runs, calls=2)
    assert ours.losses[-1] < ours.losses[0] - 0.5
    held_out = [char_lm.evaluate(run.model, tokens, batch=2, chunk=50) for run in (ours, theirs)]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-4)


@pytest.mark.parametrize("kind", char_lm.MODELS[1:], ids=char_lm.title_of)
def test_other_models_of_char_lm_train_alike(kind):
    tokens = char_lm.encode(TEXT)
    runs = char_lm.train(BACKENDS, tokens, steps=20, kind=kind, **SIZES)
    check_alike(runs, calls=kind[1])


def test_char_lms_threshold_is_what_trigrams_know():
    tokens = torch.arange(60) % 3
    after_each_pair = (1 + 20) / (20 + char_lm.UNKNOWN + 1)  # 19 of two pairs
    found = char_lm.trigram_bits(tokens, tokens[:30])
    assert found == pytest.approx(-math.log2(after_each_pair), abs=0.05)
    assert char_lm.trigram_bits(tokens, tokens.flip(0)) > found


def test_char_lm_notices_that_no_kernel_ran(monkeypatch):
    monkeypatch.setattr(fusedrnn, "replace", lambda model: None)
    with pytest.raises(RuntimeError, match=r"expected .*'kernel_forward': 4.* calls of fusedrnn's"):
        char_lm.train(["fusedrnn"], char_lm.encode(TEXT), steps=2, **SIZES)


def test_streams_go_on_where_the_last_chunk_ended():
    streams = char_lm.Streams(torch.arange(100), batch=3, chunk=4)  # rows 0.., 33.., 66..
    assert streams.chunks == 8
    input, target = streams[0]
    assert input.tolist() == [[0, 33, 66], [1, 34, 67], [2, 35, 68], [3, 36, 69]]
    assert target.tolist() == (input + 1).tolist()
    assert streams[1][0][0].tolist() == target[-1].tolist()
    assert streams[7][1][-1].tolist() == [32, 65, 98]
    with pytest.raises(ValueError, match="3 streams of 41 need more than 100 tokens"):
        char_lm.Streams(torch.arange(100), batch=3, chunk=40)


def test_encode_maps_what_is_not_a_symbol_to_unknown():
    tokens = char_lm.encode("a\n~\té".encode())
    assert tokens.tolist() == [66, 0, 95] + [char_lm.UNKNOWN] * 3


def test_corpus_is_the_same_every_time_and_keeps_files_apart():
    training, held_out = char_lm.corpus()
    again, _ = char_lm.corpus()
    assert torch.equal(training, again)
    assert len(training) > 10 * len(held_out) > 100_000


def test_sample_is_seeded():
    torch.manual_seed(0)
    model = char_lm.CharModel(hidden=8, dropout=0.0)
    texts = [char_lm.sample(model, "def ", 50, 1.0, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def ")
    assert len(texts[0]) == 54


def test_char_lm_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    threads = torch.get_num_threads()
    try:
        char_lm.main(["--quick", "--steps", "20", "--length", "30", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    for expected in ("torch.nn", "held-out loss", "steps 19 to 20", "Speed-up", "40 calls forward"):
        assert expected in out
    assert (tmp_path / "char_lm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", [prefix_sum.PLAIN, prefix_sum.TRUNCATED, prefix_sum.FORCED])
def test_prefix_sum_trains_alike(method):
    sizes = {"steps": 25, "hidden": 12, "batch": 4, "n": 3, "seed": 2}
    runs = prefix_sum.train(BACKENDS, "LSTM", method, 40, **sizes)
    check_alike(runs, calls=1)
    shares = [prefix_sum.evaluate(run.model, 3, length=50, seed=2) for run in runs.values()]
    torch.testing.assert_close(*shares, rtol=0, atol=0.05)


def test_prefix_sum_of_a_perfect_model_is_right_and_the_table_says_so():
    """The two layers learn sums modulo 3 in a second; what they were told they then do alone."""
    sizes = {"steps": 300, "hidden": 32, "batch": 16, "n": 3, "seed": 0}
    runs = prefix_sum.train(["torch.nn"], "two layers", prefix_sum.FORCED, 20, **sizes)
    correct = prefix_sum.evaluate(runs["torch.nn"].model, 3, length=300, seed=0)
    assert correct.tolist() == [1.0] * 300
    lost = torch.full((300,), 1 / 3)
    nearly = correct.clone()
    nearly[-1] = 0.99  # no four digits tell its mean from 1
    cases = [
        (prefix_sum.PLAIN, 20, 0, correct, lost),
        (prefix_sum.PLAIN, 20, 1, nearly, lost),
        (prefix_sum.PLAIN, 200, 0, lost, correct),
        (prefix_sum.TRUNCATED, 200, 0, lost, correct),
        (prefix_sum.TRUNCATED, 500, 0, lost, lost),
        (prefix_sum.PLAIN, 500, 0, lost, lost),
        (prefix_sum.FORCED, 200, 0, correct, correct),
        (prefix_sum.FORCED, 500, 0, correct, correct),
    ]
    rows = [
        prefix_sum.Trained(model, method, length, seed, runs, {"torch.nn": shares[i]})
        for i, model in enumerate(prefix_sum.MODELS)
        for method, length, seed, *shares in cases
    ]
    assert [verdict for _, verdict in prefix_sum.findings(rows)] == [
        "in part; at 20: torch.nn 1 of 2 seeds (0.9999)",
        "reproduced; at 200: torch.nn yes (0.3333)",
        "reproduced; at 500: torch.nn yes (0.3333)",
        "reproduced; at 200: torch.nn yes (0.3333); at 500: torch.nn yes (0.3333)",
        "reproduced; at 200: torch.nn yes (1.0000); at 500: torch.nn yes (1.0000)",
        "NOT reproduced; at 20: torch.nn 0 of 2 seeds (0.3333)",
        "NOT reproduced; at 200: torch.nn no (1.0000)",
        "reproduced; at 500: torch.nn yes (0.3333)",
        "in part; at 200: torch.nn no (1.0000); at 500: torch.nn yes (0.3333)",
        "reproduced; at 200: torch.nn yes (1.0000); at 500: torch.nn yes (1.0000)",
    ]


@pytest.mark.parametrize("variant", ["RNN, radius 1", "LSTM, forget bias 5", "GRU, update bias 5"])
def test_gradient_flow_trains_alike(variant):
    sizes = {"steps": 12, "length": 15, "hidden": 10, "batch": 6, "seed": 1}
    check_alike(gradient_flow.train(BACKENDS, variant, **sizes), calls=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_flow_of_rnns_is_their_radius(backend):
    panels = gradient_flow.curves(backend, length=40, hidden=16, seed=0)
    flow, tamed = panels.values()
    for variant, (kind, radius) in gradient_flow.VARIANTS.items():
        if kind == "RNN":
            assert gradient_flow.rate(flow[variant]) == pytest.approx(radius, abs=1e-3)
    exploding, clipped, at_every_step, truncated = tamed.values()
    assert torch.equal(exploding, flow["RNN, radius 1.1"])
    assert clipped[-1] < 1 < exploding[-1]
    assert gradient_flow.rate(clipped) == pytest.approx(gradient_flow.rate(exploding))
    assert at_every_step.max() <= 1.1 * 30.0
    assert torch.equal(truncated[:25], exploding[:25])
    assert not truncated[25:].any()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_classify_trains_alike(bidirectional):
    kinds = [char_lm.encode(TEXT), char_lm.encode(TEXT.upper())]
    sizes = {"steps": 15, "hidden": 8, "batch": 6, "length": 20, "seed": 3}
    runs = classify.train(BACKENDS, kinds, bidirectional=bidirectional, **sizes)
    check_alike(runs, calls=1)
    guesses = [classify.evaluate(run.model, kinds, 20, 3, count=40)[2] for run in runs.values()]
    assert torch.equal(*guesses)


def test_classify_keeps_files_apart():
    texts = {kind: [bytes([65 + 20 * i + j]) * 9 for j in range(20)] for i, kind in enumerate("ab")}
    training, held_out = classify.split(texts)
    for ours, theirs in zip(training, held_out, strict=True):
        assert len(theirs.unique()) == 3  # two files and what is between them
        assert not set(ours.tolist()) & set(theirs.tolist()) - {0}


@pytest.mark.parametrize("forcing", [1.0, 0.5, 0.0])
def test_seq2seq_trains_alike(forcing):
    runs = seq2seq.train(BACKENDS, forcing, steps=12, hidden=10, batch=5, seed=4)
    check_alike(runs, calls=1 + seq2seq.LENGTH)
    dates = ["3 March 1998", "Tuesday, the 2nd of May, 2000"]
    assert seq2seq.translate(runs["fusedrnn"].model, dates) == seq2seq.translate(
        runs["torch.nn"].model, dates
    )


def test_seq2seq_forms_of_a_date():
    forms = [seq2seq.write(datetime.date(2003, 3, 22), form) for form in range(10)]
    assert len(set(forms)) == 10
    for text in ("Saturday, the 22nd of March, 2003", "22.03.2003", "3/22/2003", "mar 22nd '03"):
        assert text in forms
    endings = [seq2seq.ordinal(day) for day in (1, 2, 3, 4, 11, 12, 13, 21, 23, 30, 31)]
    assert " ".join(endings) == "1st 2nd 3rd 4th 11th 12th 13th 21st 23rd 30th 31st"
    with_time = seq2seq.write(datetime.date(2003, 3, 2), 7)  # the form of C's ctime()
    assert with_time == datetime.date(2003, 3, 2).ctime()


@pytest.mark.parametrize("ahead", forecast.AHEAD.values())
def test_forecast_trains_alike(ahead):
    series = torch.linspace(0, 40, 300).sin()
    sizes = {"steps": 12, "hidden": 10, "batch": 4, "length": 45, "seed": 6}
    runs = forecast.train(BACKENDS, series, ahead, **sizes)
    check_alike(runs, calls=1 + ahead)


def test_forecast_series_solves_the_equation():
    """Its derivative by central differences is what the equation says, but for their own error."""
    x = forecast.mackey_glass(2000)
    assert x.min() > 0.2
    assert x.max() < 1.5
    at = torch.arange(10, 1990)
    slope = (8 * (x[at + 1] - x[at - 1]) - (x[at + 2] - x[at - 2])) / (12 * forecast.INTERVAL)
    # The delay is 8.5 samples: the value between two, by the four around it.
    delayed = (9 * (x[at - 9] + x[at - 8]) - x[at - 10] - x[at - 7]) / 16
    expected = 0.2 * delayed / (1 + delayed**10) - 0.1 * x[at]
    assert (slope - expected).abs().max() < 0.02 * slope.abs().max()


@pytest.mark.parametrize("injection", captioning.INJECTIONS)
def test_captioning_trains_alike(injection):
    runs = captioning.train(BACKENDS, injection, steps=8, hidden=10, batch=6, seed=7)
    check_alike(runs, calls=1)
    pictures = scenes.render(scenes.make_scenes(5, held_out=True))
    captions = [captioning.describe(run.model, pictures) for run in runs.values()]
    assert captions[0] == captions[1]


def test_scenes_are_drawn_as_they_are_described():
    first, second = scenes.Thing("square", "red", "large"), scenes.Thing("circle", "blue", "small")
    beside = scenes.Scene([first, second], above=False)
    assert str(beside) == "a large red square left of a small blue circle"
    assert str(scenes.Scene([second], False)) == "a small blue circle"
    beside, above = scenes.render([beside, scenes.Scene([first, second], above=True)])
    for red, blue in ((beside[0], beside[2]), (above[0].t(), above[2].t())):  # [y, x], [x, y]
        columns = torch.arange(float(scenes.SIDE))
        centres = [((x > 0.5) * columns).sum() / (x > 0.5).sum() for x in (red, blue)]
        assert centres[0] == pytest.approx(scenes.SIDE / 4, abs=1.6)
        assert centres[1] == pytest.approx(3 * scenes.SIDE / 4, abs=1.6)
        assert (red > 0.5).sum() > (blue > 0.5).sum()


def test_scenes_keep_pairs_apart():
    torch.manual_seed(0)
    seen = [
        {tuple(sorted(map(str, scene.things))) for scene in scenes.make_scenes(1000, held_out)}
        for held_out in (False, True)
    ]
    assert not seen[0] & seen[1]
    assert {len(things) for things in seen[0]} == {1, 2}
    caption = "a small red circle left of a large blue square"
    tokens = captioning.WORDS.encode([caption, "a small red circle"])
    assert captioning.WORDS.decode(tokens) == [caption, "a small red circle"]
    assert len(tokens) == captioning.LONGEST


def test_video_trains_alike():
    runs = video.train(BACKENDS, steps=8, hidden=10, batch=4, length=6, seed=8)
    check_alike(runs, calls=2)


def test_video_labels_are_what_moves():
    torch.manual_seed(1)
    frames, ways, turns = video.make_clips(30, 40)
    assert frames.shape == (30, 40, 1, video.SIDE, video.SIDE)
    light = frames.clamp(min=0.4).sub(0.4)[:, :, 0]  # without the noise
    columns = torch.arange(float(video.SIDE))
    centres = torch.stack([light.sum(dim) @ columns for dim in (2, 3)], -1)
    centres /= light.sum((2, 3))[..., None]
    moves = centres.diff(dim=0)
    assert (moves - video.STEPS[ways[1:]]).abs().max() < 0.6
    assert (ways[0] == -1).all()
    seen = (ways[1:].diff(dim=0) != 0).sum(0)
    assert turns.tolist() == (seen.clamp(1, 3) - 1).tolist()


@pytest.mark.parametrize("sees", [True, False])
def test_dialogue_trains_alike(sees):
    runs = dialogue.train(BACKENDS, sees, steps=8, hidden=10, batch=6, seed=9)
    check_alike(runs, calls=2)
    pictures, asked = dialogue.make_batch(5, held_out=True)
    questions = [question for _, question, _ in asked]
    answers = [dialogue.answer(run.model, pictures, questions) for run in runs.values()]
    assert answers[0] == answers[1]


def test_dialogue_asks_what_the_scene_answers():
    things = [scenes.Thing("square", "red", "large"), scenes.Thing("circle", "blue", "small")]
    torch.manual_seed(0)
    told = {dialogue.ask(scenes.Scene(things, above=True))[1:] for _ in range(1000)}
    assert len(dict(told)) == len(told)  # no question has two answers
    for question, answer in {
        "how many things are there ?": "two",
        "is there a blue circle ?": "yes",
        "is there a red circle ?": "no",
        "what size is the circle ?": "small",
        "what shape is the red thing ?": "square",
        "what is above the blue circle ?": "a large red square",
        "what is below the red square ?": "a small blue circle",
        "what is above the red square ?": "nothing",
        "what is left of the blue circle ?": "nothing",
    }.items():
        assert (question, answer) in told


def output_of(tmp_path, quick=False):
    return common.Output("some", argparse.Namespace(out=tmp_path, quick=quick, threads=1, note=""))


def test_a_missed_threshold_is_an_exit_code(tmp_path, capsys):
    output = output_of(tmp_path)
    output.threshold("accuracy", {"torch.nn": 0.9, "fusedrnn": 0.7}, at_least=0.8)
    output.threshold("loss", {"torch.nn": 0.1, "fusedrnn": math.nan}, at_most=0.2)
    assert (
        "accuracy, fusedrnn: 0.7000, threshold at least 0.8: NOT reached" in capsys.readouterr().out
    )
    assert common.missed(output.record) == [
        "accuracy, fusedrnn: threshold at least 0.8 not reached",
        "loss, fusedrnn: threshold at most 0.2 not reached",
    ]
    assert common.exit_code(output.record) == 1
    json.dumps(output.record, allow_nan=False)
    quick = output_of(tmp_path, quick=True)
    quick.threshold("accuracy", {"fusedrnn": 0.7}, at_least=0.8)
    assert common.exit_code(quick.record) == 0


def test_what_was_printed_is_kept_at_once(tmp_path, capsys):
    output = output_of(tmp_path)
    output("a line")
    assert (tmp_path / "some.txt").read_text() == capsys.readouterr().out
    assert "a line" in (tmp_path / "some.txt").read_text()


def test_the_control_is_torch_nn_from_other_roundings(tmp_path, capsys):
    tokens = char_lm.encode(TEXT)
    runs = char_lm.train(common.BACKENDS["control"], tokens, steps=20, **SIZES)
    theirs, nudged = runs["torch.nn"], runs[common.CONTROL]
    assert nudged.losses != theirs.losses
    torch.testing.assert_close(nudged.losses, theirs.losses, rtol=0, atol=1e-4)
    output_of(tmp_path).agreement(runs)
    assert "torch.nn's own, from weights one rounding larger, by 0.0%" in capsys.readouterr().out


def test_a_missing_library_is_told_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as raised:
        prefix_sum.main([])
    assert raised.value.code == 2
    expected = "prefix_sum: needs rich and matplotlib: pip install rich matplotlib\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (char_lm.main, ["--steps", "0"], "expected a whole number of at least 1, got '0'"),
        (char_lm.main, ["--batch", "-3"], "expected a whole number of at least 1, got '-3'"),
        (char_lm.main, ["--temperature", "0"], "expected a number above 0, got '0'"),
        (char_lm.main, ["--temperature", "warm"], "expected a number above 0, got 'warm'"),
        (char_lm.main, ["--seed", "-1"], "expected a whole number from 0 up, got -1"),
        (char_lm.main, ["--backend", "jax"], "invalid choice: 'jax'"),
        (char_lm.main, ["--out", __file__], "cannot make the folder"),
        (char_lm.main, ["--batch", "1024", "--chunk", "128"], "need more than 100000 tokens"),
        (char_lm.main, ["--cell", "CNN"], "invalid choice: 'CNN'"),
        (char_lm.main, ["--threads", "4096"], "the cores of this process, got 4096"),
        (video.main, ["--length", "3"], "expected at least 4 frames, got 3"),
        (gradient_flow.main, ["--length", "1"], "expected at least 2 steps, got 1"),
        (prefix_sum.main, ["--n", "0"], "expected a whole number of at least 1, got '0'"),
        (forecast.main, ["--length", "40"], "argument --length: expected more than 40"),
        (bench_samples.main, ["--rounds", "2"], "expected at least 3 to show a spread, got 2"),
        (
            bench_samples.main,
            ["--cells", "LSTM,CNN"],
            "expected some of LSTM,GRU,RNN, got 'LSTM,CNN'",
        ),
        (
            bench_samples.main,
            ["--threads", "1,100000"],
            "threads, the cores of this process, got 1,100000",
        ),
        (bench_samples.main, ["--out", f"{__file__}/table.md"], "cannot write"),
    ],
)
def test_bad_options_are_told_in_one_line(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
