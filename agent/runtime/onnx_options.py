"""What onnxruntime's execution providers are told: memory, and where compiled forms are kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnxruntime

from agent.runtime.compiled import INTO_FOLDER, INTO_MODEL, CompiledFile, CompiledFolder, key, processor
from agent.runtime.port import Arrays, LoadOptions

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"

#: Compile nothing: onnxruntime's own optimised graph is kept. Not for CUDA: what it saves there holds copies
#: between memories, and nothing shows yet that it is placed the same when it is read again.
_GRAPH = frozenset({CPU})


def provider_options(name: str, load: LoadOptions, folder: Path | None) -> dict[str, str]:
    """The provider's options, all as text. `folder` is where it may keep compiled forms."""
    options: dict[str, str] = {}
    limit = load.gpu_memory_bytes
    if name in ("CUDAExecutionProvider", "ROCMExecutionProvider"):
        # The default doubles the arena each time, which is too much when several models share one GPU.
        options |= {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}
        if limit:
            options["gpu_mem_limit"] = str(limit)
    elif name == "TensorrtExecutionProvider":
        if limit:
            options["trt_max_workspace_size"] = str(limit)
        if folder is not None:
            options |= {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(folder),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(folder),
            }
    elif name == "MIGraphXExecutionProvider":
        if limit:
            options["migraphx_mem_limit"] = str(limit)
        if folder is not None:
            options["migraphx_model_cache_dir"] = str(folder)
    elif name == "OpenVINOExecutionProvider":
        options["num_of_threads"] = str(load.threads)
        if folder is not None:
            options["cache_dir"] = str(folder)
    elif name == "CoreMLExecutionProvider" and folder is not None:
        options["ModelCacheDirectory"] = str(folder)
    return options


class Compilation:
    """The compiled form of one model for one order of providers, one version of onnxruntime and one kind of CPU.

    `begin`, then `prepare` the session's options, `keep` once it is open, `end` always.
    """

    def __init__(self, file: CompiledFile | None, folder: CompiledFolder | None, context: bool) -> None:
        self._file = file
        self._folder = folder
        self._context = context
        self._found: bytes | None = None
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()
        self.active = file is not None

    @classmethod
    def begin(cls, content: bytes, providers: list[str], load: LoadOptions) -> Compilation:
        """Inactive without `load.compiled`, and when that folder cannot be used: that only costs time."""
        if not load.compiled:
            return cls(None, None, False)
        # A card may be moved to another board: optimised graphs hold what only this CPU can run.
        name = key(content, *providers, onnxruntime.__version__, processor(), str(load.gpu_memory_bytes))
        root = Path(load.compiled)
        asked = set(providers)
        try:
            folder = CompiledFolder(root / f"{name}.engines") if asked & INTO_FOLDER else None
            context = bool(asked & INTO_MODEL) and not folder
            file = CompiledFile(root, f"{name}.onnx") if context or asked <= _GRAPH else None
        except OSError as error:
            log.warning("compiled forms cannot be kept in %s: %s", root, error)
            return cls(None, None, False)
        return cls(file, folder, context)

    @property
    def folder(self) -> Path | None:
        return self._folder.path if self._folder is not None else None

    def prepare(self, options: Any) -> bytes | None:
        """Make the session use the kept form, which is returned, or write a new one."""
        file = self._file
        if file is None:
            return None
        self._found = file.read()
        if self._found is not None:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        elif self._context:
            options.add_session_config_entry("ep.context_enable", "1")
            options.add_session_config_entry("ep.context_embed_mode", "1")
            options.add_session_config_entry("ep.context_file_path", str(file.draft))
        else:
            options.optimized_model_filepath = str(file.draft)
        return self._found

    def keep(self) -> None:
        """The session is open: what it wrote is good."""
        if self._file is not None and self._found is None:
            self._file.keep()

    def end(self) -> None:
        if self._file is not None:
            self._file.discard()
        if self._folder is not None:
            self._folder.seal()

    def ran(self, inputs: Arrays) -> None:
        """TensorRT builds an engine for shapes it has not seen when they first come: keep that, too."""
        if self._folder is not None:
            shapes = tuple(array.shape for array in inputs.values())
            if shapes not in self._shapes:
                self._shapes.add(shapes)
                self._folder.seal()
