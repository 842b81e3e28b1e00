"""What a model is run on: the one definition of a plain forward, and made-up inputs for the forwards at load.

Most models take token ids. Others take pixel values, audio features, or the decoder's own tokens beside them; which,
and how large, is read off the model's declaration (``main_input_name``, the arguments of ``forward``, the
configuration).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from patchbay.errors import FailedPreconditionError
from patchbay.ir.card import Dim, InputSpec
from patchbay.ir.dtypes import DTYPES, int64
from patchbay_server.models.taps import first_tensor

log = logging.getLogger(__name__)

TOKENS = "input_ids"
DECODER_TOKENS = "decoder_input_ids"
MASK = "attention_mask"


@dataclass(frozen=True)
class Extents:
    """How large a made-up input is: rows, tokens, and tokens of a decoder."""

    rows: int
    seq: int
    dec_seq: int

    def symbol(self, size: int, other: int, than: Extents) -> str | None:
        """The symbolic extent that is `size` here and `other` for `than`, or None."""
        for name in ("rows", "seq", "dec_seq"):
            if (getattr(self, name), getattr(than, name)) == (size, other):
                return name
        return None


#: Sizes of two made-up inputs that differ in every symbolic extent, so that an extent can be told from a width.
_PROBES = (Extents(2, 7, 6), Extents(3, 5, 4))


def forward(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The plain forward that every pass of the engine is: named inputs in, the first output tensor out, no cache."""
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = first_tensor(model(**inputs, **more))
    assert output is not None
    return output


class ModelInputs:
    """The inputs of one model.

    Args:
        model: a transformers model, or any module together with `example`.
        example: one input by argument name, rows first, for modules that declare nothing.

    Raises:
        FailedPreconditionError: the model neither declares what it takes, nor was an example given.
    """

    def __init__(self, model: torch.nn.Module, example: Mapping[str, torch.Tensor] | None = None) -> None:
        hf: Any = model
        self.example = example
        self.config: Any = getattr(hf, "config", None)
        if self.config is None and example is None:
            raise FailedPreconditionError(
                f"{type(model).__name__} does not say what it takes; give an example: pb.local(model, "
                "example={'x': tensor}), rows first"
            )
        get_text_config = getattr(self.config, "get_text_config", None)
        self.text: Any = self.config if get_text_config is None else get_text_config()
        self.arguments = inspect.signature(hf.forward).parameters
        self.main = str(getattr(hf, "main_input_name", TOKENS))
        self.device = next(model.parameters()).device
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        vision = getattr(self.config, "vision_config", None)
        self.takes_tokens = self.main == TOKENS
        self.takes_pixels = self.main == "pixel_values" or (vision is not None and "pixel_values" in self.arguments)
        self.encoder_decoder = bool(getattr(self.config, "is_encoder_decoder", False))
        self.vision = vision if vision is not None else self.config
        #: Tokens that one image takes the place of; 0 where images do not go among the tokens.
        self.image_tokens = 0
        if example is not None:
            self.takes_tokens = self.takes_pixels = self.encoder_decoder = False
        elif not (self.takes_tokens or self.takes_pixels or self.main == "input_features"):
            raise FailedPreconditionError(f"models whose main input is {self.main!r} are not served yet")
        elif self.takes_tokens and self.takes_pixels and self._image_token() is not None:
            self.image_tokens = self._count_image_tokens(model)
            self.takes_pixels = self.image_tokens > 0

    @property
    def d_vocab(self) -> int:
        """Number of token ids; 0 for models without tokens."""
        return int(getattr(self.text, "vocab_size", 0) or 0)

    @property
    def probes(self) -> tuple[Extents, Extents]:
        """Sizes of the two made-up inputs; rows that hold an image are longer by its tokens."""
        first, second = (Extents(e.rows, e.seq + self.image_tokens, e.dec_seq) for e in _PROBES)
        return first, second

    def _count_image_tokens(self, model: torch.nn.Module) -> int:
        """How many vectors the model makes of one image; 0 when it does not take images as one array per row."""
        features: Any = getattr(model, "get_image_features", None)
        if features is None:
            return 0
        pixels = torch.zeros(1, *self._pixel_shape(), device=self.device, dtype=self.dtype)
        try:
            with torch.no_grad():
                found = features(pixel_values=pixels)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            log.info("images are not served: the model wants more than an array of pixels for each (%s)", error)
            return 0
        found = getattr(found, "pooler_output", found)
        while isinstance(found, (list, tuple)) and found:
            found = found[0]
        return int(found.shape[-2]) if isinstance(found, torch.Tensor) and found.ndim >= 2 else 0

    def specs(self) -> tuple[InputSpec, ...]:
        """What runs have beside token ids."""
        float_dtype = DTYPES[str(self.dtype).removeprefix("torch.")]
        if self.example is not None:
            return tuple(
                InputSpec(name, ("rows", *value.shape[1:]), DTYPES[str(value.dtype).removeprefix("torch.")])
                for name, value in sorted(self.example.items())
            )
        specs = []
        if self.takes_pixels:
            dims: tuple[Dim, ...] = ("rows", *self._pixel_shape())
            required = self.main == "pixel_values" or not self._places_images()
            doc = "one image per row, as the model's own processor prepares it"
            if self.image_tokens:
                place = f"it takes the place of the {self.image_tokens} tokens {self._image_token()} of its row"
                doc += f"; {place}, which must be there in that number"
            specs.append(InputSpec("pixel_values", dims, float_dtype, required, doc=doc))
        if self.main == "input_features":
            specs.append(
                InputSpec("input_features", ("rows", *self._feature_shape()), float_dtype, doc="log-mel spectrogram")
            )
        if self.encoder_decoder:
            specs.append(
                InputSpec(DECODER_TOKENS, ("rows", "dec_seq"), int64, below=self.d_vocab, doc="the decoder's token ids")
            )
        return tuple(specs)

    def probe(self, extents: Extents) -> dict[str, torch.Tensor]:
        """Made-up inputs of these extents, the same every time; images among the tokens where the model puts them."""
        generator = torch.Generator().manual_seed(extents.rows * 1000 + extents.seq)
        inputs: dict[str, torch.Tensor] = {}
        for name, value in (self.example or {}).items():
            inputs[name] = value[:1].expand(extents.rows, *value.shape[1:]).clone()
        if self.takes_tokens:
            special = {self._image_token(), getattr(self.text, "pad_token_id", None)} - {None}
            inputs[TOKENS] = self._tokens(extents.rows, extents.seq, generator, special)
            if self.image_tokens:
                image: Any = self._image_token()
                inputs[TOKENS][:, 1 : 1 + self.image_tokens] = image
        if self.takes_pixels:
            inputs["pixel_values"] = torch.randn(extents.rows, *self._pixel_shape(), generator=generator)
        if self.main == "input_features":
            inputs["input_features"] = torch.randn(extents.rows, *self._feature_shape(), generator=generator)
        if self.encoder_decoder:
            padding = {getattr(self.text, "pad_token_id", None)} - {None}
            inputs[DECODER_TOKENS] = self._tokens(extents.rows, extents.dec_seq, generator, padding)
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _tokens(self, rows: int, seq: int, generator: torch.Generator, avoid: set[Any]) -> torch.Tensor:
        ids = torch.randint(0, self.d_vocab, (rows, seq), generator=generator)
        for bad in avoid:
            ids[ids == bad] = next(i for i in range(self.d_vocab) if i not in avoid)
        return ids

    def _image_token(self) -> int | None:
        for name in ("image_token_id", "image_token_index"):
            if isinstance(found := getattr(self.config, name, None), int):
                return found
        return None

    def _places_images(self) -> bool:
        """Whether image features take the place of certain tokens, so that a text without images is complete too."""
        return self._image_token() is not None

    def _pixel_shape(self) -> tuple[int, int, int]:
        size: Any = getattr(self.vision, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return int(getattr(self.vision, "num_channels", 3)), int(height), int(width)

    def _feature_shape(self) -> tuple[int, int]:
        """Mel bins and frames: Whisper's encoder halves the frames once."""
        return int(self.config.num_mel_bins), 2 * int(self.config.max_source_positions)
