"""Pictures: the numbers in them against float64 and by hand, their bytes, and the refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import FIXTURES, MODEL
from conftest import Ran, checked_refusal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from corda_convert.operations import plot_covs as covs_operation
from corda_convert.operations.plot_spectrum import SpectrumOptions, plot_spectrum
from corda_convert.plotting.heatmaps import Heatmap, covariances_figure
from corda_convert.plotting.pictures import STROKES
from corda_convert.plotting.spectra import Cut, Spectrum, spectra_figure
from corda_convert.plotting.truncations import TruncationCurves, truncation_figure

KNOWLEDGE = FIXTURES / "covariances" / "knowledge.safetensors"
TASK = FIXTURES / "covariances" / "task.safetensors"
LAYER = "model.layers.2.mlp.down_proj"


def test_covariances_are_drawn_twice_with_the_same_bytes_in_both_formats(
    done: Callable[..., Ran], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        ran = done(
            "plot",
            "covs",
            KNOWLEDGE,
            TASK,
            "--layer",
            LAYER,
            "-o",
            tmp_path / f"{name}.png",
            "-o",
            tmp_path / f"{name}.svg",
        )
        assert "1 layer of 2 files" in ran.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for text in ("knowledge", "task", LAYER, "mean |C| of a cell"):
        assert text in svg


def test_a_cell_is_the_mean_absolute_value_of_its_block_relative_to_the_diagonal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    C = torch.randn(12, 12, dtype=torch.float64)
    C = C @ C.T
    save_file({"m.0.p": C.float(), "m.0.q": torch.eye(2)}, tmp_path / "c.safetensors")
    drawn: list[Any] = []
    monkeypatch.setattr(covs_operation, "save", lambda *_: None)
    monkeypatch.setattr(covs_operation, "covariances_figure", lambda rows, names: drawn.append((rows, names)))
    covs_operation.plot_covs([tmp_path / "c.safetensors"], outputs=[tmp_path / "c.png"], layers=["p"], cells=4)
    (((layer, (heatmap,)),), names) = drawn[0]
    assert (layer, names, heatmap.side) == ("m.0.p", ["c"], 12)
    expected = C.abs().reshape(4, 3, 4, 3).mean(dim=(1, 3)) / C.diagonal().mean()
    torch.testing.assert_close(torch.tensor(heatmap.values, dtype=torch.float64), expected, rtol=1e-5, atol=0)


def test_all_heatmaps_have_one_scale_on_which_an_outlier_is_the_brightest() -> None:
    quiet = Heatmap([[1.0, 0.1], [0.1, 1.0]], 64)
    outlier = Heatmap([[50.0, 1e-9], [1e-9, 1.0]], 64)
    figure = covariances_figure([("a", [quiet, outlier]), ("b", [quiet, quiet])], ["one", "two"])
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert len(images) == 4
    assert {(image.norm.vmin, image.norm.vmax) for image in images} == {(50.0 / 1e4, 50.0)}
    assert float(images[1].get_array().min()) == 50.0 / 1e4


def test_without_names_the_layers_of_the_middle_block_are_drawn(done: Callable[..., Ran], tmp_path: Path) -> None:
    assert covs_operation.middle_layers(["b.0.x", "b.1.x", "b.1.y", "b.2.x"], 5) == ("b.1.x", "b.1.y")
    assert covs_operation.middle_layers(["x", "y", "z"], 2) == ("x", "y")
    assert "4 layers of 1 file:" in done("plot", "covs", KNOWLEDGE, "-o", tmp_path / "c.png").out


def test_singular_values_are_those_of_a_float64_svd(tmp_path: Path) -> None:
    options = SpectrumOptions(("corda", "svd", "asvd", "svd-llm"), [LAYER], "kpm", 16, device="cpu")
    (spectrum,) = plot_spectrum(MODEL, outputs=[tmp_path / "s.svg"], covariances=KNOWLEDGE, options=options)
    stored = {}
    for shard in MODEL.glob("*.safetensors"):
        stored |= load_file(shard)
    W = stored[f"{LAYER}.weight"].double()
    collected = load_file(KNOWLEDGE)
    C, scale = collected[LAYER].double(), collected[f"{LAYER}.mean_abs"].double()
    root = torch.linalg.cholesky(C)
    damped = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
    expected = {"corda": W @ damped, "svd": W, "asvd": W * scale.sqrt(), "svd-llm": W @ root}
    assert list(spectrum.values) == list(expected)
    for method, product in expected.items():
        found = torch.tensor(spectrum.values[method], dtype=torch.float64)
        torch.testing.assert_close(found, torch.linalg.svdvals(product), rtol=1e-9, atol=1e-12)
    svg = (tmp_path / "s.svg").read_text(encoding="utf-8")
    for text in (*expected, "taken: kpm, rank 16", LAYER, "singular value / largest", "component, from the largest"):
        assert text in svg


@pytest.mark.parametrize(("mode", "span"), [("ipm", (0.5, 3.5)), ("kpm", (7.5, 10.5))])
def test_the_values_that_are_taken_are_shaded_at_their_end(mode: Any, span: tuple[float, float]) -> None:
    values = [2.0**-n for n in range(10)]
    figure = spectra_figure([Spectrum("layer", (10, 12), {"corda": values})], Cut(3, mode))
    (ax,) = figure.axes
    (line,) = ax.lines
    assert list(line.get_xdata()) == list(range(1, 11))
    assert list(line.get_ydata()) == values
    (shaded,) = [patch for patch in ax.patches if patch.get_label() == f"taken: {mode}, rank 3"]
    assert (shaded.get_x(), shaded.get_x() + shaded.get_width()) == span


def test_a_spectrum_of_the_weights_alone_needs_no_covariances(done: Callable[..., Ran], tmp_path: Path) -> None:
    ran = done(
        "plot", "spectrum", MODEL, "--method", "svd", "--layer", "layers.0.self_attn.q_proj", "-o", tmp_path / "s.png"
    )
    assert ran.out == f"1 layer, svd: {tmp_path / 's.png'}\n"
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_told_apart_by_colour_marker_and_dash() -> None:
    for part in ("color", "marker", "dash"):
        first = [getattr(stroke, part) for stroke in STROKES[:4]]
        assert len(set(first)) == 4
    curves = {
        method: [(4, 10.0), (8, 20.0 + place)] for place, method in enumerate(("svd", "asvd", "corda", "svd-llm"))
    }
    figure = truncation_figure(
        [TruncationCurves("text", 9.0, curves), TruncationCurves("other", None, {"corda": [(4, 9.0)]})]
    )
    first, second = figure.axes
    drawn = {line.get_label(): line for line in first.lines}
    assert set(drawn) == {*curves, "nothing discarded"}
    assert list(drawn["asvd"].get_ydata()) == [10.0, 21.0]
    assert len({(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in drawn.values()}) == 5
    assert second.lines[0].get_color() == drawn["corda"].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*curves, "nothing discarded"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (KNOWLEDGE, "--layer", "nothing"),
            "--layer 'nothing' matches no layer.\nThe layers end in: down_proj, gate_proj",
        ),
        ((KNOWLEDGE, "--layer", "("), "--layer '(' matches no layer"),
        ((FIXTURES / "none.safetensors",), "No such covariance file"),
    ],
)
def test_covariances_that_cannot_be_drawn_are_refused(
    arguments: tuple[Any, ...], message: str, command: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = command("plot", "covs", *arguments, "-o", tmp_path / "c.png")
    assert message in checked_refusal(ran, tmp_path / "c.png")


def test_files_without_a_layer_in_common_or_with_bad_numbers_are_refused(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    bad = torch.eye(8)
    bad[0, 0] = torch.nan
    save_file({"m.0.p": torch.eye(8), "m.0.z": torch.zeros(8, 8), "m.0.n": bad}, tmp_path / "a.safetensors")
    save_file({"m.0.q": torch.eye(8)}, tmp_path / "b.safetensors")

    def said(*arguments: Any) -> str:
        return checked_refusal(command("plot", "covs", *arguments, "-o", tmp_path / "c.png"), tmp_path / "c.png")

    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert "have no covariance in common" in said(a, b)
    assert f"{b} has no covariance of m.0.p" in said(a, b, "--layer", "p")
    assert "m.0.z" in said(a, "--layer", "z")
    assert "is zero: no sample reached this layer" in said(a, "--layer", "z")
    assert "holds NaN or Inf" in said(a, "--layer", "n")


def test_outputs_are_checked_before_anything_else(
    command: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there.png"
    there.write_bytes(b"kept")
    ran = command("plot", "covs", "none", "-o", there, "-o", "x.jpg", "-o", tmp_path / "no" / "x.svg")
    assert ran.status == 1
    for part in (
        f"{there} is there already",
        "x.jpg has neither the ending .png nor .svg",
        f"There is no folder {tmp_path / 'no'}",
    ):
        assert part in ran.err
    assert there.read_bytes() == b"kept"
    assert command("plot", "covs", KNOWLEDGE, "--overwrite", "-q", "-o", there).status == 0
    assert there.read_bytes() != b"kept"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in command("plot", "covs", KNOWLEDGE, "-o", tmp_path / "y.png").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Method corda needs covariances"),
        (("--cov", KNOWLEDGE, "--mode", "kpm"), "--mode and --rank say together"),
        (("--cov", KNOWLEDGE, "--method", "svd"), "Method svd takes no covariances"),
        (("--cov", KNOWLEDGE, "--damp", "-1"), "--damp is -1.0; it is a number from 0 on"),
        (("--cov", KNOWLEDGE, "--method", "asvd", "--asvd-alpha", "nan"), "--asvd-alpha is nan"),
        (("--cov", KNOWLEDGE, "--mode", "kpm", "--rank", "97"), "--rank 97 is above what model.layers.3"),
        (("--cov", KNOWLEDGE, "--layer", "lm_head"), "matches no layer"),
    ],
)
def test_spectra_that_cannot_be_drawn_are_refused(
    arguments: tuple[Any, ...], message: str, command: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = command("plot", "spectrum", MODEL, *arguments, "-o", tmp_path / "s.png")
    assert message in checked_refusal(ran, tmp_path / "s.png")


TEXT = FIXTURES / "data" / "knowledge.txt"


def truncated_loss(method: str, discarded: int, lines: list[str]) -> float:
    """Transformers' loss on the lines, with the weights truncated by float64 SVDs."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    collected = load_file(TASK)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        parent, _, leaf = name.rpartition(".")
        C = collected[
            f"{parent}.{ {'k_proj': 'q_proj', 'v_proj': 'q_proj', 'up_proj': 'gate_proj'}.get(leaf, leaf) }"
        ].double()
        W = module.weight.data.double()
        T = C + 0.01 * C.diagonal().mean() * torch.eye(len(C)) if method == "corda" else torch.eye(W.shape[1]).double()
        U = torch.linalg.svd(W @ T, full_matrices=False).U[:, -discarded:]
        module.weight.data.copy_(W - U @ (U.T @ W))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    total, count = 0.0, 0
    with torch.no_grad():
        for line in lines:
            ids = tokenizer(line, return_tensors="pt")["input_ids"]
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def test_a_sweep_measures_models_truncated_by_float64_svds_and_draws_them_again_from_its_output(
    done: Callable[..., Ran], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    lines = TEXT.read_text(encoding="utf-8").splitlines()[:20]
    text.write_text("\n".join(lines), encoding="utf-8")
    ran = done(
        *(
            "plot",
            "truncation",
            MODEL,
            "--cov",
            TASK,
            "--data",
            text,
            "--no-pack",
            "--dtype",
            "float32",
            "--json",
            "-q",
        ),
        *("--method", "svd", "--method", "corda", "--discard", 8, "--discard", 20, "-o", tmp_path / "t.svg"),
    )
    facts = json.loads(ran.out)
    found = {(point["method"], point["discarded"]): point["loss"] for point in facts["points"]}
    assert set(found) == {("svd", 8), ("svd", 20), ("corda", 8), ("corda", 20)}
    for method, discarded in found:
        assert found[method, discarded] == pytest.approx(truncated_loss(method, discarded, lines), rel=2e-5)
    assert facts["whole"]["perplexity"] == pytest.approx(math.exp(facts["whole"]["loss"]))
    (tmp_path / "results.json").write_text(ran.out, encoding="utf-8")
    done("plot", "truncation", "--results", tmp_path / "results.json", "-o", tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "t.svg").read_bytes()
    svg = (tmp_path / "t.svg").read_text(encoding="utf-8")
    for label in ("svd", "corda", "nothing discarded", "text.txt", "perplexity", "smallest components discarded"):
        assert label in svg


def test_results_of_perplexity_on_truncated_models_are_drawn_too(done: Callable[..., Ran], tmp_path: Path) -> None:
    def result(truncation: Any, value: float | None) -> Path:
        facts = {"format": "corda_convert.perplexity", "format_version": 1, "text": "t", "truncation": truncation}
        path = tmp_path / f"{value}.json"
        path.write_text(json.dumps({**facts, "perplexity": value}), encoding="utf-8")
        return path

    files = [
        result(None, 5.0),
        result({"method": "svd", "discarded": 8}, 6.0),
        result({"method": "svd", "discarded": 4}, None),
    ]
    arguments = [argument for file in files for argument in ("--results", file)]
    ran = done("plot", "truncation", *arguments, "-o", tmp_path / "t.png")
    assert ran.out == f"3 results: {tmp_path / 't.png'}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MODEL, "--data", TEXT), "Methods asvd, corda, svd-llm need covariances"),
        (
            (MODEL, "--data", TEXT, "--method", "svd", "--discard", 48),
            "--discard 48 leaves nothing of the smallest layer, which has 48 components",
        ),
        ((MODEL, "--method", "svd"), "Neither a file nor a preset is given as text"),
        (("--results", FIXTURES / "model" / "config.json"), "holds no result of perplexity or plot truncation"),
        (("--results", FIXTURES / "none.json"), "No such file"),
    ],
)
def test_truncations_that_cannot_be_drawn_are_refused(
    arguments: tuple[Any, ...], message: str, command: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = command("plot", "truncation", *arguments, "-o", tmp_path / "t.png")
    assert message in checked_refusal(ran, tmp_path / "t.png")


def test_incomplete_results_and_both_ways_at_once_are_refused(command: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"format": "corda_convert.truncation", "format_version": 1, "text": "t"}', encoding="utf-8")
    ran = command("plot", "truncation", "--results", path, "-o", tmp_path / "t.png")
    assert f"{path} is incomplete: KeyError" in checked_refusal(ran, tmp_path / "t.png")
    path.write_text(
        json.dumps(
            {
                "format": "corda_convert.perplexity",
                "format_version": 1,
                "text": "t",
                "truncation": None,
                "perplexity": 2,
            }
        ),
        encoding="utf-8",
    )
    ran = command("plot", "truncation", "--results", path, "-o", tmp_path / "t.png")
    assert "None of the results is of a truncated model" in checked_refusal(ran, tmp_path / "t.png")
    assert command("plot", "truncation", MODEL, "--results", path, "-o", tmp_path / "t.png").status == 2
    ran = command("plot", "truncation", "--results", path, "--damp", "0.1", "-o", tmp_path / "t.png")
    assert (ran.status, "--damp is for measuring a MODEL" in ran.err) == (2, True)


def test_wide_sweeps_have_their_counts_on_an_axis_of_powers_of_two() -> None:
    (ax,) = truncation_figure([TruncationCurves("t", None, {"svd": [(8, 1.0), (16, 1.2), (64, 2.0)]})]).axes
    assert ax.get_xscale() == "log"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["8", "16", "64"]


def test_pictures_that_matplotlib_cannot_draw_or_the_disk_not_take_are_refused(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    many = {f"m.{number}.p": torch.eye(4) for number in range(190)}
    save_file(many, tmp_path / "many.safetensors")
    ran = command("plot", "covs", tmp_path / "many.safetensors", "--layer", ".*", "-o", tmp_path / "c.png")
    assert "65,536 on a side are the limit.\nChoose fewer layers" in checked_refusal(ran, tmp_path / "c.png")
    (tmp_path / ".c.png.part").mkdir()  # where the picture is written first
    ran = command("plot", "covs", KNOWLEDGE, "-o", tmp_path / "c.png")
    assert f"{tmp_path / 'c.png'} cannot be written: " in ran.err
    assert not (tmp_path / "c.png").exists()
