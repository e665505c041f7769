"""Captions from a multimodal model in this process, such as LLaVA, through transformers."""

from __future__ import annotations

import io
import os
import threading
from typing import Any

import numpy as np
import torch
from PIL import Image

from gella.captions.captioner import Reply, StoppedError, Tally
from gella.utils.hub import hub_options


class LocalCaptioner:
    """Asks a model such as LLaVA-1.5; threads that share one wait for each other.

    Args:
        path: folder written by ``save_pretrained`` (model and processor), or a name on the Hugging
            Face hub.
        device: where the model runs, such as "cpu" or "cuda".
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        max_tokens: longest answer, in tokens.
        tally: gets ``requests``, ``prompt_tokens``, ``completion_tokens``.

    Raises FileNotFoundError where no model can be read, and ValueError for an unknown dtype or a
    device that this machine lacks.
    """

    mode = "two-steps"  # models of the size that fits a machine rarely write JSON

    def __init__(
        self,
        path: str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        max_tokens: int = 512,
        tally: Tally | None = None,
    ) -> None:
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"unknown dtype {dtype!r}: auto, float32, bfloat16 or float16")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {device} was asked for, but this machine has no CUDA device")
        self._processor, model = _load(path, dtype)
        self._model = model.to(device).eval()
        self.model = os.path.basename(os.path.normpath(path)) if os.path.isdir(path) else path
        self.tally = Tally() if tally is None else tally
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._stop, self._abort = threading.Event(), threading.Event()

    def stop(self) -> None:
        """Begin no answer any more; the one under way is finished."""
        self._stop.set()

    def abort(self) -> None:
        """Stop, and end the answer under way at its next token."""
        self._stop.set()
        self._abort.set()

    def ask(self, text: str, picture: bytes | None, *, attempt: int = 0) -> Reply:
        """Answer a question, greedily; ``attempt`` > 0 samples, lest the same answer come back.

        Raises:
            StoppedError: :meth:`stop` or :meth:`abort` was called.
        """

        def aborted(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), self._abort.is_set(), device=input_ids.device)

        with self._lock, torch.inference_mode():
            if self._stop.is_set():
                raise StoppedError("stopped")
            inputs = self._inputs(text, picture).to(self._model.device, self._model.dtype)
            sampling = {"do_sample": True, "temperature": 0.7} if attempt else {"do_sample": False}
            limits = {"max_new_tokens": self._max_tokens, "stopping_criteria": [aborted]}
            output = self._model.generate(**inputs, **sampling, **limits)
        if self._abort.is_set():
            raise StoppedError("stopped")
        asked = int(inputs["input_ids"].shape[1])
        answer = output[0, asked:]
        written = self._processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
        ends = np.ravel(self._model.generation_config.eos_token_id)  # a model may have several
        ended = len(answer) < self._max_tokens or int(answer[-1]) in ends
        reply = Reply(written, asked, len(answer), complete=ended)
        self.tally.add(requests=1)
        self.tally.add_tokens(reply)
        return reply

    def _inputs(self, text: str, picture: bytes | None) -> Any:
        shown = None if picture is None else Image.open(io.BytesIO(picture)).convert("RGB")
        if getattr(self._processor, "chat_template", None):
            content: list[dict[str, Any]] = [{"type": "image", "image": shown}] if shown else []
            message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
            form: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
            template = self._processor.apply_chat_template
            return template([message], add_generation_prompt=True, **form)
        # LLaVA-1.5's conversation; its early checkpoints were saved without a template.
        mark = getattr(self._processor, "image_token", "<image>") + "\n"
        image = {"images": shown} if shown else {}
        question = f"USER: {mark if image else ''}{text} ASSISTANT:"
        return self._processor(text=question, return_tensors="pt", **image)


def _load(path: str, dtype: str) -> tuple[Any, Any]:
    """Processor and model of a folder or hub name."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = os.path.expanduser(path)
    try:
        options = hub_options(path)
        processor = AutoProcessor.from_pretrained(path, **options)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"no image-text model with its processor can be read from {path} ({reason})"
        ) from error
    if not hasattr(processor, "tokenizer"):
        raise FileNotFoundError(
            f"{path} holds a {type(processor).__name__}, not the processor of an image-text model; "
            "save the processor beside the model by processor.save_pretrained"
        )
    return processor, model
