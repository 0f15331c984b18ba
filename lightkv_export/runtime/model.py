"""A bundle ready to run: `load` opens it, `Model.run` answers one request, `Model.session` starts a conversation."""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from dataclasses import replace

from lightkv_export.bundle import Bundle, open_bundle
from lightkv_export.runtime.backend import Backend, open_backend
from lightkv_export.runtime.chat import Chat
from lightkv_export.runtime.generation import GREEDY, Request, Result
from lightkv_export.runtime.graphs import Graphs
from lightkv_export.runtime.image import ImageFeatures, ImageSource, sized_pixels
from lightkv_export.runtime.session import Session


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = "ort",
    device: str | None = None,
    threads: int | None = None,
    verify: bool = True,
) -> Model:
    """Open a bundle for running. Graphs are loaded when they are first needed.

    Args:
        path: the bundle's directory.
        backend: "ort" (ONNX Runtime) or "trt" (TensorRT engines, made by `lightkv build`).
        device: "cpu" or "cuda"; None: what the backend is for (ort: cpu, trt: cuda).
        threads: CPU threads of one graph; None takes all cores.
        verify: compare the hash of every file with the manifest (sizes are always compared).

    Raises:
        BundleError: not a whole bundle. BackendError: the backend is missing. UserError: an unknown backend or device.
    """
    bundle = open_bundle(path, verify=verify)
    return Model(bundle, open_backend(backend, bundle.path, device, threads, bundle.manifest.lowering))


class Model:
    """A bundle on a backend. Sessions share its graphs; only one of them may run at a time."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.manifest, self.backend = bundle, bundle.manifest, backend
        self.graphs = Graphs(bundle, backend)
        self.chat = Chat(bundle.path, bundle.manifest)

    def session(
        self, keep: float | None = None, *, one_shot: bool = False, prefill_chunk: int | None = None
    ) -> Session:
        """A new conversation; see `Session` for the arguments.

        Raises:
            UserError: the bundle has no such keep (None: its default).
        """
        chosen = self.manifest.keep_named(keep)
        return Session(self.graphs, self.chat, chosen, one_shot=one_shot, prefill_chunk=prefill_chunk)

    def encode(self, image: ImageSource) -> ImageFeatures:
        """The image's vision tokens at the size of the bundle that fits it best, for several requests about it.

        Raises:
            UserError: the image cannot be used. BundleError: the bundle takes no images.
        """
        pixels = sized_pixels(self.manifest, image)
        return self.graphs.image_features(pixels.values, pixels.size)

    def run(
        self,
        prompt: str | Seq[dict],
        images: Seq[ImageSource | ImageFeatures] = (),
        *,
        keep: float | None = None,
        request: Request = GREEDY,
        **settings: object,
    ) -> Result:
        """Answer one request with caches of exactly the planned size.

        Args:
            prompt: the user's text, or messages ({"role", "content"}) whose last one is the user's.
            images: paths, bytes, PIL images, uint8 arrays or what `encode` made of one, in the order in which the
                messages show them.
            keep: which keep of the bundle; None takes its default.
            request: length, sampling and callbacks; `settings` are its fields by name (max_new_tokens, sampling, ...).

        Raises:
            UserError: the input cannot be used; the message says why. BackendError: the backend failed.
        """
        session = self.session(keep, one_shot=True)
        session.append(prompt, images)
        return session.generate(replace(request, **settings))
