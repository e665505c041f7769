"""Captions and their nouns from multimodal models: chat endpoints and local models.

    captioner = open_captioner("http://127.0.0.1:8000/v1", "some-model")
    caption = caption_picture(captioner, read_image("street.jpg", upright=True))
    print(caption.description, caption.nouns)

The demo and the web page get their captions here; ``tools/describe_images.py`` writes many.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from gella.captions.captioner import PROMPTS, Caption, Captioner, Tally, describe, load_picture
from gella.captions.endpoint import EndpointCaptioner, EndpointSettings
from gella.captions.local import LocalCaptioner

__all__ = ["caption_picture", "is_endpoint", "open_captioner"]


def is_endpoint(address: str) -> bool:
    """Whether a captioner's address is that of an endpoint, not a local model's path or name."""
    return address.lower().startswith(("http://", "https://"))


def open_captioner(
    address: str,
    model: str | None = None,
    *,
    device: str = "cpu",
    settings: EndpointSettings | None = None,
    tally: Tally | None = None,
) -> Any:
    """Open the model that an address names; it has ``ask``, ``stop``, ``abort`` and ``model``.

    Args:
        address: ``http://...`` or ``https://...`` of an OpenAI-compatible endpoint, such as
            ``https://host/v1``; else a folder of ``save_pretrained``, or a name on the Hugging Face
            hub, of an image-text model that runs in this process.
        model: the endpoint's model; None takes ``GELLA_API_MODEL``. Not for a local model.
        device: of the local model.
        settings: how patiently to ask the endpoint.
        tally: gets the counts of requests and tokens.

    The endpoint's key comes from the environment only (``GELLA_API_KEY``).

    Raises:
        ValueError: there is no model's name, or one too many, or the address or the key cannot be
            right; the key is not shown.
        FileNotFoundError: no local model can be read there.
    """
    if not is_endpoint(address):
        if model:
            raise ValueError(
                f"model {model!r} was given for {address}, which is no http:// or https:// address "
                "and so a local model; leave the model's name out, or give an endpoint's address"
            )
        return LocalCaptioner(address, device=device, tally=tally)
    name = model or os.environ.get("GELLA_API_MODEL", "")
    if not name:
        raise ValueError(
            f"the endpoint {address} needs the name of a model: give it (--captioner-model NAME), "
            "or set GELLA_API_MODEL"
        )
    return EndpointCaptioner.from_environment(address, name, settings=settings, tally=tally)


def caption_picture(
    captioner: Captioner,
    image: np.ndarray,
    prompt: str = PROMPTS["overview"],
    *,
    attempts: int = 3,
    max_side: int = 1024,
) -> Caption:
    """Let a captioner describe one picture and list the nouns of its description.

    Args:
        captioner: of :func:`open_captioner`, or any other.
        image: uint8 RGB (H, W, 3).
        prompt: what kind of description.
        attempts: answers to ask for at most, until one can be used.
        max_side: longest side of what is sent, in pixels; it holds no metadata of the file.

    Raises:
        AnswerError, RequestError: this picture gets no caption; the next may.
        EndpointError: no question can be answered.
        StoppedError: the captioner was told to stop.
    """
    # Models of the size that fits a machine rarely write JSON; two plain questions serve them.
    mode = "two-steps" if isinstance(captioner, LocalCaptioner) else "json"
    picture = load_picture(image, max_side=max_side)
    return describe(captioner, picture, prompt, mode=mode, attempts=attempts)
