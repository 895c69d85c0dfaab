"""Torch's library without `import torch`, which takes longer than merging a gigabyte.

Of all of torch a merge needs the conversion of half precision only. It is called through the C
interface that the library has for compiled models. This module imports nothing heavy, so that the
library can be loaded while everything else is.
"""

import ctypes
import importlib.util
import threading
from functools import cache
from pathlib import Path


def load_meanwhile() -> None:
    """Load the library in the background: it takes a sixth of a second, not holding Python's lock.

    Who needs it before it is there waits for it in the dynamic linker.
    """
    threading.Thread(target=libtorch).start()


@cache
def libtorch() -> ctypes.CDLL | None:
    """Load the library with the signatures that are used; None if it has no such interface."""
    spec = importlib.util.find_spec("torch")
    places = spec.submodule_search_locations if spec is not None else None
    found = [Path(place) / "lib" / "libtorch_cpu.so" for place in places or ()]
    try:
        library = ctypes.CDLL(str(found[0]))
        integer, pointer = ctypes.c_int32, ctypes.c_void_p
        library.aoti_torch_create_tensor_from_blob.argtypes = (
            *(pointer, ctypes.c_int64, pointer, pointer, ctypes.c_int64),
            *(integer, integer, integer, pointer),
        )
        library.aoti_torch_copy_.argtypes = (pointer, pointer, integer)
        library.aoti_torch_delete_tensor_object.argtypes = (pointer,)
        library.omp_set_num_threads.argtypes = (integer,)
        for name in ("float16", "bfloat16", "float32"):
            getattr(library, f"aoti_torch_dtype_{name}").restype = integer
    except (OSError, AttributeError, IndexError):
        return None
    return library
