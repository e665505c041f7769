"""Captions and their nouns from multimodal models: chat endpoints and local models.

    captioner = open_captioner("http://127.0.0.1:8000/v1", "some-model")
    caption = describe(captioner, load_picture("street.jpg", upright=True))
    print(caption.description, caption.nouns)

The demo and the web page get their captions so; ``tools/describe_images.py`` writes many.
"""

from __future__ import annotations

from typing import Any

from gella.captions.captioner import describe, load_picture
from gella.captions.endpoint import EndpointCaptioner, EndpointSettings
from gella.captions.local import LocalCaptioner

__all__ = ["describe", "load_picture", "open_captioner"]


def open_captioner(
    address: str,
    model: str | None = None,
    *,
    device: str = "cpu",
    settings: EndpointSettings | None = None,
) -> Any:
    """Open the model that an address names; besides ``ask`` it has ``stop`` and ``abort``.

    Args:
        address: ``https://host/v1`` of an endpoint, else what `LocalCaptioner` takes.
        model: the endpoint's model; None takes ``GELLA_API_MODEL``. Not for a local model.
        device: of the local model.
        settings: how patiently to ask the endpoint. Its key comes from ``GELLA_API_KEY`` only.

    Raises ValueError for a model's name that is missing or one too many, and what the two raise.
    """
    if address.lower().startswith(("http://", "https://")):
        return EndpointCaptioner.from_environment(address, model, settings=settings)
    if model:
        raise ValueError(
            f"model {model!r} was given for {address}, which is no http:// or https:// address "
            "and so a local model; leave the model's name out, or give an endpoint's address"
        )
    return LocalCaptioner(address, device=device)
