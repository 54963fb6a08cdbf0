"""Functions of libcuda for C code to call: they note launches as `stub_driver.py` does, from what lies in memory."""

import ctypes
import struct
from typing import Any

from triton_ssm._native import EntryPoints

_CODES = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d", "map": "q120x"}
_PDL, _COOPERATIVE = 6, 2  # CU_LAUNCH_ATTRIBUTE_…


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gridX", "gridY", "gridZ", "blockX", "blockY", "blockZ", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    ]


_Parameters = ctypes.POINTER(ctypes.c_void_p)
_Launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_void_p, _Parameters, ctypes.c_void_p)
_Context = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
_Message = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))


class StubCuda:
    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._maps: list[Any] = []
        self.launched = 0
        """How often from C."""
        self.code = 0
        """What a launch returns."""
        self.context = 0x7
        self._functions = _Launch(self._launch), _Context(self._current), _Message(self._message)
        self._addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self._functions]

    def entry_points(self) -> EntryPoints:
        launch, context, message = self._addresses
        if self._driver.timed:
            # Returns 0, and that while no thread holds Python's lock, as launches should be.
            launch = ctypes.cast(ctypes.pythonapi.PyGILState_Check, ctypes.c_void_p).value or 0
        return EntryPoints(launch, context, message, self.sizes)

    def sizes(self, function: int) -> list[int]:
        return [size for _, size in self._parameters(function)]

    def bytes_of_map(self, made: Any) -> bytes:
        self._maps.append(made)
        return struct.pack(_CODES["map"], len(self._maps) - 1)

    def _parameters(self, function: int) -> list[tuple[str, int]]:
        """Type and size of each, as the driver has them: those that are no constants, and Triton's two scratches."""
        types = [type_ for type_ in (*self._driver.utils.signatures[function], "*", "*") if type_ != "constexpr"]
        return [(type_, 8 if type_[0] == "*" else struct.calcsize(_CODES[type_])) for type_ in types]

    def _launch(self, config: Any, function: int, parameters: Any, extra: Any) -> int:
        config = config.contents
        self.launched += 1
        given = []
        for (type_, size), address in zip(self._parameters(function), parameters, strict=False):
            assert address % size == 0 or (type_ == "map" and address % 64 == 0)
            memory = ctypes.string_at(address, size)
            if type_ == "map":
                given.append(self._maps[struct.unpack(_CODES["map"], memory)[0]])
            else:
                given.append(struct.unpack("Q" if type_[0] == "*" else _CODES[type_], memory)[0])
        attributes = {
            config.attributes[index].id: config.attributes[index].value for index in range(config.n_attributes)
        }
        assert (config.blockY, config.blockZ, given[-2:]) == (1, 1, [0, 0])
        if self._driver.launches is not None:
            grid = config.gridX, config.gridY, config.gridZ
            flags = attributes.get(_COOPERATIVE, 0) == 1, attributes.get(_PDL, 0) == 1
            metadata = config.blockX // 32, 1, config.shared
            head = (*grid, config.stream, function, *flags, None, None, metadata, None, None, None)
            self._driver.launches.append((*head, *given[:-2]))
        return self.code

    def _current(self, context: Any) -> int:
        context[0] = self.context
        return 0

    def _message(self, code: int, message: Any) -> int:
        message[0] = b"stubbed"
        return 0
