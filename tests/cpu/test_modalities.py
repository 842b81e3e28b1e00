"""Encoders, encoder-decoders, vision, vision-language and audio models: their sites, and runs over named inputs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.errors import GraphError, TraceError, UnknownSiteError
from tests.modalities import D_MODEL, FAMILIES, HEADS, PATCHES, VOCAB, build, given, inputs_of, reference

ATOL = 1e-5
TEXT = ("bert", "roberta", "modernbert", "distilbert")
PAIRS = ("t5", "bart", "whisper")
TOWERS = ("clip", "siglip")

#: What every layer of every family here offers, whatever its own arrangement.
LAYER = {
    "resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out",
    "attn.q", "attn.k", "attn.v", "attn.attn_scores", "attn.pattern", "attn.z", "attn.result", "attn.out",
    "mlp.pre", "mlp.post", "mlp.out", "ln1.scale", "ln1.normalized", "ln2.scale", "ln2.normalized",
}  # fmt: skip
CROSS = {
    "resid_mid_cross", "cross_attn_in", "cross_attn_out", "ln3.scale", "ln3.normalized", "cross_attn.q", "cross_attn.k",
    "cross_attn.v", "cross_attn.attn_scores", "cross_attn.pattern", "cross_attn.z", "cross_attn.result",
    "cross_attn.out",
}  # fmt: skip
BEFORE = {
    "bert": {"embed", "pos_embed", "token_type_embed", "embed_ln.scale", "embed_ln.normalized", "logits"},
    "roberta": {"embed", "pos_embed", "token_type_embed", "embed_ln.scale", "embed_ln.normalized", "logits"},
    "modernbert": {"embed", "embed_ln.scale", "embed_ln.normalized", "ln_final.scale", "ln_final.normalized", "logits"},
    "distilbert": {"embed", "pos_embed", "embed_ln.scale", "embed_ln.normalized", "logits"},
    "t5": {"encoder.embed", "decoder.embed", "encoder.ln_final.normalized", "decoder.ln_final.normalized", "logits"},
    "bart": {"encoder.embed", "encoder.pos_embed", "encoder.embed_ln.normalized", "decoder.embed", "decoder.pos_embed",
             "decoder.embed_ln.normalized", "logits"},
    "vit": {"embed", "pos_embed", "patch_embed", "ln_final.scale", "ln_final.normalized"},
    "dinov2": {"embed", "pos_embed", "patch_embed", "ln_final.scale", "ln_final.normalized"},
    "clip": {"text.embed", "text.pos_embed", "text.ln_final.normalized", "vision.embed", "vision.pos_embed",
             "vision.patch_embed", "vision.embed_ln.normalized"},
    "siglip": {"text.embed", "text.pos_embed", "text.ln_final.normalized", "vision.embed", "vision.pos_embed",
               "vision.patch_embed", "vision.ln_final.normalized"},
    "whisper": {"encoder.embed", "encoder.pos_embed", "encoder.patch_embed", "encoder.ln_final.normalized",
                "decoder.embed", "decoder.pos_embed", "decoder.ln_final.normalized", "logits"},
    "llava": {"embed", "ln_final.normalized", "logits", "vision.embed", "vision.pos_embed", "vision.patch_embed",
              "vision.embed_ln.normalized"},
}  # fmt: skip


@functools.cache
def _hosted(family: str) -> tuple[Any, pb.Model]:
    model = build(family)
    return model, pb.local(model)


def _prefixes(family: str) -> tuple[str, ...]:
    if family in PAIRS:
        return ("encoder.", "decoder.")
    return {"clip": ("text.", "vision."), "siglip": ("text.", "vision."), "llava": ("", "vision.")}.get(family, ("",))


def _offered(model: pb.Model) -> set[str]:
    return {s.name for s in model.card.sites if s.absent is None and not s.name.startswith("module:")}


def _read(model: pb.Model, inputs: Any, sites: list[str], **options: Any) -> dict[str, np.ndarray]:
    with model.trace(inputs, **options) as run:
        run.save(**{f"s{i}": run.site(name) for i, name in enumerate(sites)})
    return {name: run.results[f"s{i}"] for i, name in enumerate(sites)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_offers_its_sites(family: str) -> None:
    """Each stack of each family has every canonical site of its layers, and what stands before and after them."""
    offered = _offered(_hosted(family)[1])
    wanted = set(BEFORE[family])
    for prefix in _prefixes(family):
        for i in range(2):
            wanted |= {f"{prefix}blocks.{i}.{name}" for name in LAYER}
            if prefix == "decoder.":
                wanted |= {f"{prefix}blocks.{i}.{name}" for name in CROSS}
    if family == "modernbert":  # its first layer attends to the embedding as it is: the norm stands before
        wanted -= {"blocks.0.ln1.scale", "blocks.0.ln1.normalized"}
    assert wanted - offered == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_what_transformers_says(family: str) -> None:
    """Hidden states, attention patterns (cross-attention too) and logits equal those of an eager twin."""
    inputs = inputs_of(family)
    expected = reference(family, inputs)
    assert len(expected) >= 4
    seen = _read(_hosted(family)[1], given(inputs), list(expected))
    for name, value in expected.items():
        np.testing.assert_allclose(seen[name], value.numpy(), atol=ATOL, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_changes_no_bit(family: str) -> None:
    """With every canonical site read, the last layers give bit for bit what the plain model gives."""
    model, served = _hosted(family)
    inputs = inputs_of(family)
    last = [n for p in _prefixes(family) if (n := f"{p}blocks.1.resid_post")]
    plain: dict[str, torch.Tensor] = {}
    handles = []
    for name, path in zip(last, _layer_paths(served, last), strict=True):
        keep = functools.partial(_keep, plain, name)
        handles.append(model.get_submodule(path).register_forward_hook(keep))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    seen = _read(served, given(inputs), sorted(_offered(served)), deterministic=True)
    for name in last:
        assert np.array_equal(seen[name], plain[name].numpy()), name


def _keep(into: dict[str, torch.Tensor], name: str, module: Any, args: Any, output: Any) -> None:
    del module, args
    into[name] = (output[0] if isinstance(output, tuple) else output).clone()


def _layer_paths(model: pb.Model, sites: list[str]) -> list[str]:
    """The module behind each ``resid_post``: the one whose output is visited at the same moment of the forward."""
    by_order = sorted((s.order, s.name) for s in model.card.sites if s.absent is None)
    paths = []
    for site in sites:
        index = by_order.index((model.card.site(site).order, site))
        modules = [n for _, n in by_order[index - 3 : index + 8] if n.startswith("module:") and n.endswith(".output")]
        layers = [n for n in modules if n.removesuffix(".output").rpartition(".")[2] == "1"]
        paths.append(layers[0].removeprefix("module:").removesuffix(".output"))
    return paths


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_go_where_they_should(family: str) -> None:
    """An edit of a layer's output equals the same edit by a hook; z set to zero leaves only the projection's bias."""
    model, served = _hosted(family)
    inputs = inputs_of(family)
    prefix = _prefixes(family)[-1]
    site, following = f"{prefix}blocks.0.resid_post", f"{prefix}blocks.1.resid_post"
    change = np.linspace(-1, 1, D_MODEL, dtype=np.float32)
    with served.trace(given(inputs)) as run:
        run.site(site)[:, 1] += change
        edited = run.site(following).save()
    (path,) = _layer_paths(served, [following])
    before = path.removesuffix("1") + "0"
    seen: dict[str, torch.Tensor] = {}

    def edit(module: Any, args: Any, output: Any) -> Any:
        del module, args
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, 1] += torch.from_numpy(change)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [
        model.get_submodule(before).register_forward_hook(edit),
        model.get_submodule(path).register_forward_hook(functools.partial(_keep, seen, "after")),
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(edited.value, seen["after"].numpy(), atol=ATOL, rtol=1e-4)

    kind = "cross_attn" if prefix == "decoder." else "attn"
    with served.trace(given(inputs)) as run:
        run.site(f"{prefix}blocks.0.{kind}.z")[...] = 0.0
        out = run.site(f"{prefix}blocks.0.{kind}.out").save()
        result = run.site(f"{prefix}blocks.0.{kind}.result").save()
    assert not result.value.any()
    np.testing.assert_allclose(out.value, np.broadcast_to(out.value[:1, :1], out.value.shape), atol=1e-6)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in TOWERS])
def test_gradients_reach_what_enters(family: str) -> None:
    """A value of the last layer has a finite gradient, not all zero, with respect to what enters the first."""
    _, served = _hosted(family)
    prefix = _prefixes(family)[0]
    last = f"{_prefixes(family)[-1] if family in PAIRS else prefix}blocks.1.resid_post"
    inputs = given(inputs_of(family))
    with served.trace(inputs) as run:
        entry = run.site(f"{prefix}blocks.0.resid_pre")
        metric = run.site(last)[:, -1].sum()
        slope = pb.grad(metric, entry).save()
    assert slope.value.shape[-1] == D_MODEL
    assert np.isfinite(slope.value).all() and np.abs(slope.value).max() > 0


@pytest.mark.parametrize("family", TEXT)
def test_ragged_rows_equal_each_row_alone(family: str) -> None:
    """In a bidirectional encoder, rows of unequal length see no padding: each gives what it gives alone."""
    _, served = _hosted(family)
    assert served.card.ragged and not served.card.causal
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    sites = ["blocks.1.resid_post", "logits"]
    together = _read(served, rows, sites)
    for i, row in enumerate(rows):
        alone = _read(served, [row], sites)
        for site in sites:
            np.testing.assert_allclose(together[site][i, -len(row) :], alone[site][0], atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_ragged_rows_of_an_encoder(family: str) -> None:
    """The decoder attends to no padding of the encoder's rows."""
    _, served = _hosted(family)
    rows, start = [[5, 6, 7, 8, 9], [11, 12, 13]], np.array([[3, 4, 5], [6, 7, 8]])
    together = _read(served, {"text": rows, "decoder_input_ids": start}, ["logits", "encoder.blocks.1.resid_post"])
    for i, row in enumerate(rows):
        alone = _read(served, {"text": [row], "decoder_input_ids": start[i : i + 1]}, ["logits"])
        np.testing.assert_allclose(together["logits"][i], alone["logits"][0], atol=ATOL, rtol=1e-4)
    assert not together["encoder.blocks.1.resid_post"][1, :2].any()


def test_cards_know_the_kind_of_model() -> None:
    """Longest rows, causality and inputs are those of the model."""
    cards = {family: _hosted(family)[1].card for family in ("roberta", "llava", "whisper", "vit", "bart")}
    assert cards["roberta"].n_ctx == 32  # 34 positions, of which two stand before the first
    assert cards["whisper"].n_ctx == 20
    assert cards["llava"].causal and not cards["roberta"].causal
    assert [i.name for i in cards["vit"].inputs] == ["pixel_values"] and not cards["vit"].takes_tokens
    (image,) = cards["llava"].inputs
    assert not image.required and f"{PATCHES} tokens {VOCAB - 1}" in image.doc
    assert cards["bart"].site("decoder.blocks.0.cross_attn.pattern").dims == ("rows", HEADS, "dec_query", "key")
    assert cards["vit"].site("blocks.0.attn.pattern").dims == ("rows", HEADS, PATCHES + 1, PATCHES + 1)


def test_a_text_without_an_image() -> None:
    """A vision-language model runs on text alone; its image tower is then refused by name."""
    model, served = _hosted("llava")
    ids = [[5, 6, 7], [8, 9]]
    logits = _read(served, ids, ["logits"])["logits"]
    with torch.no_grad():
        plain = model(input_ids=torch.tensor(ids[:1])).logits
    np.testing.assert_allclose(logits[0], plain[0].numpy(), atol=ATOL, rtol=1e-4)
    with (
        pytest.raises(GraphError, match=r"never reached the site 'vision\.blocks\.0\.resid_post'.*no 'pixel_values'"),
        served.trace(ids) as run,
    ):
        run.site("vision.blocks.0.resid_post").save()


def test_images_change_what_follows_them() -> None:
    """Patching the image tower's patches between two runs carries one image into the other run's text."""
    _, served = _hosted("llava")
    inputs = given(inputs_of("llava"))
    other = {**inputs, "pixel_values": inputs["pixel_values"][::-1].copy()}
    with served.trace() as t:
        first, second = t.run(inputs), t.run(other)
        mixed = t.run(inputs)
        mixed.site("vision.embed")[...] = second.site("vision.embed")
        t.save(first=first.logits, second=second.logits, mixed=mixed.logits)
    results = t.results
    np.testing.assert_allclose(results["mixed"], results["second"], atol=ATOL, rtol=1e-4)
    assert np.abs(results["mixed"][:, -1] - results["first"][:, -1]).max() > 1e-3


@pytest.mark.parametrize(
    ("family", "inputs", "says"),
    [
        ("vit", [[1, 2]], "takes no tokens"),
        ("vit", {}, r"needs the input 'pixel_values' \[rows, 3, 16, 16\]"),
        ("vit", {"pixel_values": np.zeros((2, 3, 8, 8))}, r"is \[rows, 3, 16, 16\], not \[2, 3, 8, 8\]"),
        ("vit", {"pixels": np.zeros((2, 3, 16, 16))}, "has no input 'pixels'"),
        ("t5", [[1, 2]], "needs the input 'decoder_input_ids'"),
        ("t5", {"decoder_input_ids": [[1]]}, "under 'text', beside decoder_input_ids"),
        ("t5", {"text": [[1, 2]], "decoder_input_ids": [[99]]}, "outside 0 to 49"),
        ("t5", {"text": [[1, 2]], "decoder_input_ids": [[1], [2]]}, "their rows differ"),
        ("whisper", {"input_features": np.zeros((1, 8, 20)), "decoder_input_ids": [[1] * 21]}, "at most 20"),
    ],
)
def test_wrong_inputs_are_refused_at_the_users_line(family: str, inputs: Any, says: str) -> None:
    """Inputs that are missing, unknown or misshapen fail where the run is made, and say what is wanted."""
    _, served = _hosted(family)
    with served.trace() as t, pytest.raises(TraceError, match=says):
        t.run(inputs)


def test_image_tokens_must_match() -> None:
    """An image without its tokens is refused with the model's own reason."""
    _, served = _hosted("llava")
    pixels = np.zeros((1, 3, 16, 16), np.float32)
    with (
        pytest.raises(GraphError, match="Image features and image tokens do not match"),
        served.trace({"text": [[5, 6, 7]], "pixel_values": pixels}) as run,
    ):
        run.logits.save()


def test_prefixed_sites_by_every_spelling() -> None:
    """Stacks are attributes of a run, other tools' spellings lead to them, and near misses are named."""
    _, served = _hosted("t5")
    with served.trace(given(inputs_of("t5"))) as run:
        run.save(
            attribute=run.encoder.blocks[-1].attn.z,
            spelled=run.site("encoder.blocks[1].attn.hook_z"),
            cross=run.decoder.blocks[0].cross_attn.pattern,
        )
        with pytest.raises(UnknownSiteError, match=r"did you mean 'decoder\.blocks\.0\.cross_attn\.pattern'"):
            run.site("decoder.blocks.0.cros_attn.pattern")
        with pytest.raises(UnknownSiteError, match=r"did you mean 'encoder\.blocks\.0\.resid_pre'"):
            run.site("blocks.0.resid_pre")
    assert np.array_equal(run.results["attribute"], run.results["spelled"])
    np.testing.assert_allclose(run.results["cross"].sum(-1), 1.0, atol=1e-5)
    assert "decoder.blocks[i].cross_attn: q, k, v, attn_scores, pattern, z, result, out" in repr(served)
