"""Drive a Triton launcher against the fake driver and print, as JSON, what reached it.

    drive.py ours EXTENSION          our prebuilt extension, as Triton 3.5 calls it
    drive.py triton                  Triton 3.5's own driver.c and generated launchers, compiled here with its own code
    drive.py ours-3.8 EXTENSION      our prebuilt extension, as Triton 3.8 calls it
    drive.py triton-3.8              Triton 3.8's own driver.c

Runs in a process of its own, with LD_LIBRARY_PATH leading to the fake libcuda.so.1; standard library only.
"""

import ctypes
import importlib.util
import json
import sys
import threading
import time

MAP = 128


class Tensor:
    """What a launcher may know of a tensor."""

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address


class Broken:
    def data_ptr(self):
        raise KeyError("no")


F = float
# name, signature, arguments, sizes in bytes of what the kernel must get.
CASES = [
    ("nothing", (), (), ()),
    ("pointers", ("*fp32", "*i8", "*bf16"), (Tensor(0x7000), 0x123456789ABC, None), (8, 8, 8)),
    ("null tensor", ("*fp32",), (Tensor(0),), (8,)),
    ("true as a pointer", ("*i1",), (True,), (8,)),
    ("largest pointer", ("*i1",), (2**64 - 1,), (8,)),
    ("signed", ("i1", "i8", "i16", "i32", "i64"), (True, 255, -32768, -(2**31), -(2**63)), (1, 1, 2, 4, 8)),
    ("signed high", ("i1", "i8", "i16", "i32", "i64"), (0, 0, 32767, 2**31 - 1, 2**63 - 1), (1, 1, 2, 4, 8)),
    ("unsigned", ("u1", "u8", "u16", "u32", "u64"), (1, 255, 65535, 2**32 - 1, 2**64 - 1), (1, 1, 2, 4, 8)),
    ("unsigned masked", ("u8", "u16", "u32", "u64"), (-1, 65537, 2**32 + 5, -1), (1, 2, 4, 8)),
    ("unsigned huge", ("u64", "u32"), (2**70 + 3, 2**70 + 3), (8, 4)),
    ("floats", ("fp16", "bf16", "fp32", "f32", "fp64"), (1.1, 1.1, 1.1, -2.5, 1.1), (2, 2, 4, 4, 8)),
    ("floats of ints", ("fp16", "bf16", "fp32", "fp64"), (3, 3, 3, True), (2, 2, 4, 8)),
    ("zeros", ("fp16",) * 2 + ("fp32",), (0.0, -0.0, -0.0), (2, 2, 4)),
    ("infinite", ("fp16", "fp16", "bf16", "fp32"), (F("inf"), F("-inf"), F("inf"), F("-inf")), (2, 2, 2, 4)),
    ("not a number", ("fp16", "bf16", "fp64"), (F("nan"), F("nan"), F("nan")), (2, 2, 8)),
    ("fp32 overflow", ("fp32", "bf16"), (1e300, -1e300), (4, 2)),
    ("constexpr", ("constexpr", "*i8", "constexpr", "i32"), (object(), 16, "x", 7), (8, 4)),
    ("tuples", (("*fp32", "i32", ("fp32", "constexpr")), "i64"), ((Tensor(64), 5, (0.5, 3)), -1), (8, 4, 4, 8)),
    ("tuple of a list", (("*fp32", ("i32",)), "i8"), ([Tensor(64), [5]], 1), (8, 4, 1)),
    ("empty tuple", ((), "i32"), ((), 4), (4,)),
    ("tensor map", ("nvTmaDesc", "i32", "i64"), ("MAP", 3, 4), (MAP, 4, 8)),
    ("many", ("*fp32", "i32") * 60, (Tensor(4096), 9) * 60, (8, 4) * 60),
    # Faults.
    ("too few", ("i32", "i32"), (1,), ()),
    ("too many", ("i32",), (1, 2), ()),
    ("i8 negative", ("i8",), (-1,), (1,)),
    ("i8 high", ("i8",), (256,), (1,)),
    ("i16 high", ("i16",), (32768,), (2,)),
    ("i16 low", ("i16",), (-32769,), (2,)),
    ("i32 high", ("i32",), (2**31,), (4,)),
    ("i32 huge", ("i32",), (2**80,), ()),
    ("i64 high", ("i64",), (2**63,), ()),
    ("i32 of a float", ("i32",), (1.5,), ()),
    ("u64 of a float", ("u64",), (1.5,), ()),
    ("u32 of text", ("u32",), ("1",), ()),
    ("float of text", ("fp32",), ("1",), ()),
    ("fp16 overflow", ("fp16",), (65520.0,), ()),
    ("pointer of text", ("*i8",), ("1",), ()),
    ("pointer negative", ("*i8",), (-1,), ()),
    ("pointer too large", ("*i8",), (2**64,), ()),
    ("data_ptr raises", ("*i8",), (Broken(),), ()),
    ("data_ptr no int", ("*i8",), (Tensor("x"),), ()),
    ("host tensor", ("i32", "*i8"), (1, Tensor(0xBAD)), ()),
    ("driver failure", ("*i8",), (Tensor(0xDEAD),), ()),
    ("no tensor map", ("nvTmaDesc",), (7,), ()),
    ("tuple too short", (("i32", "i32"),), ((1,),), ()),
    ("tuple too long", (("i32",),), ((1, 2),), ()),
    ("no tuple", (("i32",),), (5,), ()),
]
HALVES = [
    *(2.0**e for e in range(-27, 17)),
    *(m * 2.0**e for e in range(-26, 15) for m in (1.0004882, 1.00048828125, 1.00146484375, 1.9995, 1.99951171875)),
    65504.0, 65519.9, 65519.999999, 5.960464477539063e-08, 2.98023223876953125e-08, 2.9802322387695315e-08, 6.1e-05,
]  # fmt: skip
# grid, cooperative, pdl, (warps, ctas, shared, cluster x, y, z), scratch buffers
SHAPES = [
    ((3, 4, 5), False, False, (4, 1, 1000, 1, 1, 1), (None, None)),
    ((3, 4, 5), False, False, (8, 2, 0, 2, 1, 1), (None, None)),
    ((1, 1, 1), True, True, (1, 4, 232448, 2, 2, 1), (Tensor(0x100), 0x200)),
    ((1, 1, 1), 1, 0, (1, 1, 0, 1, 1, 1), (None, None)),
    ((1, 1, 1), 0, 1, (1, 1, 0, 1, 1, 1), (None, None)),
    ((0, 4, 5), False, False, (4, 1, 0, 1, 1, 1), (None, None)),
    ((-1, 1, 1), False, False, (4, 1, 0, 1, 1, 1), (None, None)),
    ((-1, -1, 1), False, False, (4, 1, 0, 1, 1, 1), (None, None)),
    ((2**31, 1, 1), False, False, (4, 1, 0, 1, 1, 1), (None, None)),
    ((1, 1, 1), False, False, (4, 1, 0), (None, None)),
    ((1, 1, 1), False, False, [4, 1, 0, 1, 1, 1], (None, None)),
    ((1, 1, 1), False, False, (4, 1, 0, 1, 1, 1), (Tensor(0xBAD), None)),
]


class Fake:
    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.fake_text.restype = ctypes.c_char_p

    def reset(self, sizes=(), pause=0, failure=0):
        self.library.fake_reset((ctypes.c_int * max(1, len(sizes)))(*sizes), len(sizes), pause, failure)

    @property
    def text(self):
        return self.library.fake_text().decode()


def attempt(fake, function):
    """What a call wrote down, or the type of what it raised."""
    try:
        value = function()
    except Exception as fault:
        return type(fault).__name__
    return [fake.text, None if value is None else str(value)]


def launch_args(shape, hooks=(None, None), metadata=None):
    grid, cooperative, pdl, kernel, scratch = shape
    return (*grid, 0xABC, 0xDEF, cooperative, pdl, *scratch, kernel, metadata, *hooks)


def all_cases(fake, module, make, skip=()):
    fake.reset()
    fill = getattr(module, "fill_tma_descriptor_tiled" if skip else "fill_tma_descriptor")
    tensor_map = fill(0x7000, 3, 2, 6, [64, 128], (256, 512), (512, 1), 0)
    for name, signature, args, sizes in CASES:
        if name in skip:
            continue
        launch = make(signature)
        args = tuple(tensor_map if arg == "MAP" else arg for arg in args)
        fake.reset((*sizes, 8, 8))
        yield name, attempt(fake, lambda launch=launch, args=args: launch(*launch_args(SHAPES[0]), *args))
    half = make(("fp16", "bf16", "fp32"))
    for number in HALVES:
        fake.reset((2, 2, 4))
        yield f"half {number!r}", attempt(fake, lambda n=number: half(*launch_args(SHAPES[0]), n, -n, n))
    one = make(("i32",))
    for index, shape in enumerate(SHAPES):
        if f"shape {index}" in skip:
            continue
        fake.reset((4, 8, 8))
        yield f"shape {index}", attempt(fake, lambda shape=shape: one(*launch_args(shape), 5))
    yield from hook_cases(fake, one)


def hook_cases(fake, one):
    seen = []
    fake.reset((4,))
    hooks = (lambda data: seen.append(("enter", data, fake.text)), lambda data: seen.append(("exit", data, fake.text)))
    one(*launch_args(SHAPES[0], hooks, "metadata"), 1)
    yield "hooks", seen
    fake.reset((4,))
    yield "hook raises", attempt(fake, lambda: one(*launch_args(SHAPES[0], (lambda data: 1 / 0, None)), 1))
    yield "hook raises, nothing launched", fake.text
    fake.reset((4,), failure=700)
    yield "launch fails", attempt(fake, lambda: one(*launch_args(SHAPES[0]), 1))
    fake.reset((4,), pause=300)
    yield "others run meanwhile", count_meanwhile(lambda: one(*launch_args(SHAPES[0]), 1)) > 3


def count_meanwhile(function):
    counted, stop = [], threading.Event()

    def count():
        while not stop.is_set():
            counted.append(1)
            time.sleep(0.02)

    thread = threading.Thread(target=count)
    thread.start()
    function()
    seen = len(counted)
    stop.set()
    thread.join()
    return seen


def utility_cases(fake, module):
    for name, call in {
        "load": lambda: module.load_binary("kernel", b"image", 1000, 0),
        "load with much shared memory": lambda: module.load_binary("kernel", b"image", 200000, 0),
        "load broken": lambda: module.load_binary("kernel", b"broken", 0, 0),
        "load no bytes": lambda: module.load_binary("kernel", 5, 0, 0),
        "properties": lambda: module.get_device_properties(3),
        "clusters": lambda: module.cuOccupancyMaxActiveClusters(0x2222, 1024, 2, 1, 1),
        "fifo": lambda: module.set_printf_fifo_size(8192),
        "fifo unchanged": lambda: module.set_printf_fifo_size(4096),
        "fifo negative": lambda: module.set_printf_fifo_size(-1),
        "map of rank 1": lambda: module.fill_tma_descriptor(0x70, 0, 4, 7, [64], [999], [1], 1) and None,
        "map of rank 3": lambda: (
            module.fill_tma_descriptor(0x70, 3, 2, 6, [1, 8, 64], [7, 9, 5], (45, 5, 1), 0) and None
        ),
        "map of rank 5": lambda: module.fill_tma_descriptor(7, 3, 2, 6, [1] * 5, [2] * 5, [16, 8, 4, 2, 1], 0) and None,
        "map of different ranks": lambda: module.fill_tma_descriptor(7, 3, 2, 6, [1, 2], [3], [1], 0),
        "map of text": lambda: module.fill_tma_descriptor(7, 3, 2, 6, ["a"], [3], [1], 0),
    }.items():
        fake.reset()
        yield name, attempt(fake, call)


def utility_cases_of_38(fake, module):
    fill, columns = module.fill_tma_descriptor_tiled, module.fill_tma_descriptor_im2col
    picture = (7, 3, 2, 6, [16, 64], [2, 9, 9, 64], [5184, 576, 64, 1], 1)
    for name, call in {
        "load": lambda: module.load_binary("kernel", b"image", 1000, 0),
        "load with much shared memory": lambda: module.load_binary("kernel", b"image", 200000, 0),
        "load broken": lambda: module.load_binary("kernel", b"broken", 0, 0),
        "unload": lambda: module.unload_module(0x1111),
        "properties": lambda: module.get_device_properties(3),
        "capability": lambda: module.get_device_capability(3),
        "current device": lambda: module.get_current_device(),
        "another device": lambda: module.set_current_device(2),
        "default stream": lambda: module.get_default_stream(1),
        "clusters": lambda: module.cuOccupancyMaxActiveClusters(0x2222, 1024, 2),
        "fifo": lambda: module.set_printf_fifo_size(8192),
        "fifo negative": lambda: module.set_printf_fifo_size(-1),
        "map of rank 1": lambda: fill(0x70, 0, 4, 7, [64], [999], [1], 1) and None,
        "map of rank 3": lambda: fill(0x70, 3, 2, 6, [1, 8, 64], [7, 9, 5], (45, 5, 1), 0) and None,
        "map of different ranks": lambda: fill(7, 3, 2, 6, [1, 2], [3], [1], 0),
        "columns": lambda: columns(*picture, [0, -1], [2, -3], [1, 2, 2, 1]) and None,
        "columns with a box of three": lambda: columns(7, 3, 2, 6, [1, 2, 3], *picture[5:], [0, 0], [0, 0], [1] * 4),
        "columns with too few steps": lambda: columns(*picture, [0, 0], [0, 0], [1]),
        "columns with unlike corners": lambda: columns(*picture, [0, 0], [0], [1] * 4),
    }.items():
        fake.reset()
        yield name, attempt(fake, call)


# What Triton 3.8 does not check: it reads whatever lies behind too few arguments. It takes a list for a tuple.
UNCHECKED = ("too few", "too many", "tuple too short", "tuple too long", "shape 10")


def cases_of_38(fake, module, make):
    """The same cases, with calls turned into those of Triton 3.8."""

    def flat(signature):
        launch = make(signature)

        def call(*args):
            scratch, kernel, rest = args[7:9], args[9], args[10:13]
            return launch(*args[:7], kernel[:3], *rest, *scratch, args[13:])

        return call

    yield from all_cases(fake, module, flat, UNCHECKED)
    one = flat(("i32",))
    for ctas in (2, 16):
        fake.reset((4, 8, 8))
        shape = ((1, 1, 1), False, False, (4, ctas, 0), (None, None))
        yield f"{ctas} CTAs", attempt(fake, lambda shape=shape: one(*launch_args(shape), 5))
    yield from utility_cases_of_38(fake, module)
    yield "map in memory", memory_of_map(fake, module, make)


def memory_of_map(fake, module, make):
    """The bytes of a small map and of a large one as a kernel gets them."""
    found = []
    launch = make(("nvTmaDesc",))
    for side in (64, 4096):
        tensor_map = module.fill_tma_descriptor_tiled(0x7000, 3, 2, 38, [64, 64], (side, side), (side, 1), 0)
        fake.reset((MAP,))
        launch(1, 1, 1, 0, 1, False, False, (4, 1, 0), None, None, None, None, None, (tensor_map,))
        found.append(fake.text)
    return found


CODES = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "L", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "K",
    "fp16": "e", "bf16": "g", "fp32": "f", "f32": "f", "fp64": "d", "nvTmaDesc": "T", "constexpr": "x",
}  # fmt: skip


CODES_38 = {kind: "s" if kind[0] == "i" else "u" if kind[0] == "u" else one for kind, one in CODES.items()}


def code(kind, codes):
    if isinstance(kind, tuple):
        return f"({''.join(code(one, codes) for one in kind)})"
    return "P" if kind[0] == "*" else codes[kind]


def ours(path, codes=CODES, launcher="launcher"):
    spec = importlib.util.spec_from_file_location("_composer_launch", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, lambda signature: getattr(module, launcher)("".join(code(one, codes) for one in signature))


def tritons():
    from pathlib import Path

    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    build = {"library_dirs": driver.library_dirs(), "include_dirs": driver.include_dirs, "libraries": ["cuda"]}
    source = (Path(driver.__file__).parent / "driver.c").read_text()
    module = compile_module_from_src(src=source, name="cuda_utils", **build)
    driver.PyCUtensorMap = module.PyCUtensorMap

    def make(signature):
        source = driver.make_launcher({}, dict(enumerate(signature)), None)
        return compile_module_from_src(src=source, name="__triton_launcher", **build).launch

    return module, make


def tritons_of_38():
    from pathlib import Path

    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_file

    module = compile_module_from_file(
        src_path=str(Path(driver.__file__).parent / "driver.c"), name="cuda_utils", library_dirs=driver.library_dirs(),
        include_dirs=driver.include_dirs, libraries=driver.libraries,
    )  # fmt: skip
    driver.PyKernelArg, driver.ARG_CONSTEXPR = module.PyKernelArg, module.ARG_CONSTEXPR
    driver.ARG_KERNEL, driver.ARG_TUPLE = module.ARG_KERNEL, module.ARG_TUPLE

    def flattened(signature):
        return [one for kind in signature for one in (flattened(kind) if isinstance(kind, tuple) else [kind])]

    def make(signature):
        annotations = driver.annotate_arguments(signature)
        kinds = module.build_signature_metadata([one for one in flattened(signature) if one != "constexpr"])
        return lambda *args: module.launch(*args[:-1], annotations, kinds, args[-1])

    return module, make


if __name__ == "__main__":
    way, path = sys.argv[1], sys.argv[2:]
    fake = Fake()
    fake.reset()
    if way.endswith("-3.8"):
        module, make = ours(*path, CODES_38, "packed_launcher") if path else tritons_of_38()
        print(json.dumps(dict(cases_of_38(fake, module, make))))
    else:
        module, make = ours(*path) if path else tritons()
        print(json.dumps(dict(all_cases(fake, module, make)) | dict(utility_cases(fake, module))))
