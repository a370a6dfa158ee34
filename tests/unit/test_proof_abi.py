"""Verdicts on symbols, with facts written by hand: what is found, by whom, and how bad it is when nothing has it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from composer.formats.elf import Elf
from composer.formats.linkage import Linkage, Wanted, digest
from composer.formats.loader import Tree
from composer.model.finding import Finding
from composer.proofs.abi import Abi, check_abi

PYTHON, SITE = "bin/python3.12", "lib/python3.12/site-packages"
TENSOR, OPTIONAL = "_ZN2at6TensorC1Ev", "_ZN3c104impl3cow23materialize_cow_storageERNS_11StorageImplE"
LIBRARY = "_ZNR5torch7Library4_defEON3c1014FunctionSchemaE"


def elf(*needed: str, soname: str | None = None, kind: str = "shared", machine: str = "x86_64") -> Elf:
    return Elf(machine=machine, bits=64, kind=kind, soname=soname, needed=needed, rpath=("$ORIGIN", "$ORIGIN/../lib"),  # type: ignore[arg-type]
               dynamic=True, versions_needed={}, size=1)  # fmt: skip


def linkage(defines: str = "", wants: Sequence[str | Wanted] = (), modules: str = "") -> Linkage:
    wanted = [one if isinstance(one, Wanted) else Wanted(one) for one in wants]
    return Linkage(defined=b"".join(digest(name.encode()) for name in defines.split()), wanted=wanted,
                   modules=modules.split())  # fmt: skip


class Stack:
    """A tree with a program and a libtorch, to which tests add objects."""

    def __init__(self) -> None:
        self.objects = {
            PYTHON: elf("libm.so.6", "libc.so.6", kind="executable"),
            f"{SITE}/torch/lib/libc10.so": elf(soname="libc10.so"),
            f"{SITE}/torch/lib/libtorch_cpu.so": elf("libc10.so", soname="libtorch_cpu.so"),
        }
        self.linkage = {
            PYTHON: linkage("PyModule_Create2 Py_IncRef", [Wanted("ceil", "GLIBC_2.2.5", "libm.so.6")]),
            f"{SITE}/torch/lib/libc10.so": linkage(OPTIONAL),
            f"{SITE}/torch/lib/libtorch_cpu.so": linkage(f"{TENSOR} {LIBRARY} aoti_torch_empty", [OPTIONAL]),
        }

    def add(self, path: str, facts: Linkage, *needed: str, program: bool = False, machine: str = "x86_64") -> None:
        kind = "executable" if program else "shared"
        path = path if program else f"{SITE}/{path}"
        self.objects[path] = elf(*needed, kind=kind, machine=machine, soname=None)
        self.linkage[path] = facts

    def check(self, *, program: str | None = PYTHON) -> Abi:
        objects = {path: one for path, one in self.objects.items() if program or path != PYTHON}
        facts = {path: one for path, one in self.linkage.items() if path in objects}
        return check_abi(Tree(objects=objects), facts, "3.12", program=program)

    def findings(self, *, program: str | None = PYTHON) -> list[Finding]:
        return [one for one in self.check(program=program).findings if one.id != "abi.torch"]


@pytest.fixture
def stack() -> Stack:
    return Stack()


def ids(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(one.severity, one.id) for one in findings]


def test_a_sound_stack_has_no_finding(stack: Stack) -> None:
    stack.add(
        "torch/lib/ext.so", linkage(wants=[TENSOR, OPTIONAL, "PyModule_Create2"], modules="ext"), "libtorch_cpu.so"
    )
    assert stack.findings() == []


def test_what_an_extension_misses_is_an_error_though_only_calls_use_it(stack: Stack) -> None:
    stack.add("torch/lib/ext.so", linkage(wants=[TENSOR, Wanted("_ZN2at3oldEv", lazy=True)], modules="ext"),
              "libtorch_cpu.so")  # fmt: skip
    (found,) = stack.findings()
    assert (found.severity, found.id, found.subject) == ("error", "abi.missing", f"{SITE}/torch/lib/ext.so")
    assert found.evidence == "1 of the 2 symbols that it wants are defined by nothing that is loaded: _ZN2at3oldEv"
    assert found.fix is not None
    assert "build it from source" in found.fix


def test_what_is_defined_elsewhere_is_missing_all_the_same(stack: Stack) -> None:
    stack.add("other.so", linkage("helper"))
    stack.add("ext.so", linkage(wants=["helper"], modules="ext"))
    (found,) = stack.findings()
    assert found.fix == "Let it need other.so, which defines some."


def test_a_library_below_an_extension_sees_what_the_extension_brings(stack: Stack) -> None:
    stack.add("libplug.so", linkage(wants=["hook"]))
    stack.add("ext.so", linkage(modules="ext"), "libplug.so", "libhook.so")
    stack.add("libhook.so", linkage("hook"))
    assert stack.findings() == []
    stack.add("bad.so", linkage(modules="bad"), "libplug.so")
    (found,) = stack.findings()
    assert (found.severity, found.subject) == ("error", f"{SITE}/libplug.so")
    assert f"when {SITE}/bad.so loads it" in found.evidence


def test_operators_of_a_library_that_nobody_needs_are_opened_by_python(stack: Stack) -> None:
    stack.add("torch/lib/ops.so", linkage(wants=[LIBRARY, "_ZN2at3newEv"]), "libtorch_cpu.so")
    assert ids(stack.findings()) == [("error", "abi.missing")]


@pytest.mark.parametrize(("lazy", "found"), [(True, ("note", "abi.lazy")), (False, ("warning", "abi.unloadable"))])
def test_what_nothing_opens_for_python_is_no_error(stack: Stack, lazy: bool, found: tuple[str, str]) -> None:
    stack.add("libplugin.so", linkage(wants=[Wanted("_ZN2at3oldEv", lazy=lazy)]))
    assert ids(stack.findings()) == [found]


def test_a_plugin_is_judged_below_what_needs_it(stack: Stack) -> None:
    stack.add("libplugin.so", linkage(wants=["host_of_plugins"]))
    stack.add("libhost.so", linkage("host_of_plugins"), "libplugin.so")
    assert stack.findings() == []


@pytest.mark.parametrize(
    ("wanted", "needed"),
    [
        (Wanted("malloc", "GLIBC_2.2.5", "libc.so.6"), "libc.so.6"),
        (Wanted("ceil"), "libc.so.6"),  # libm's, by what the program wants of it
        (Wanted("dlopen"), "libc.so.6"),
        (Wanted("pthread_create"), "libc.so.6"),
        (Wanted("cuInit"), "libcuda.so.1"),
        (Wanted("nvmlInit_v2"), "libnvidia-ml.so.1"),
        (Wanted("ibv_open_device", "IBVERBS_1.1", "libibverbs.so.1"), "libibverbs.so.1"),
        (Wanted("MPI_Init"), "libmpi.so.40"),
        (Wanted("_ZNSs4swapERSs", "GLIBCXX_3.4", "libstdc++.so.6"), "libstdc++.so.6"),
    ],
)  # fmt: skip
def test_the_host_is_trusted_with_its_own(stack: Stack, wanted: Wanted, needed: str) -> None:
    versioned = Wanted("free", "GLIBC_2.2.5", "libc.so.6")
    stack.add("ext.so", linkage(wants=[wanted, versioned], modules="ext"), needed, "libc.so.6")
    assert stack.findings() == []


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("cublasCreate_v2", "libcuda.so.1"), ("cuInit", "libc.so.6"), ("aoti_torch_new", "libc.so.6"),
        ("_ZN2at3newEv", "libmpi.so.40"), ("PyNew_Function", "libc.so.6"), ("cuFileOpen", "libcuda.so.1"),
    ],
)  # fmt: skip
def test_and_with_nothing_else(stack: Stack, name: str, needed: str) -> None:
    versioned = Wanted("free", "GLIBC_2.2.5", "libc.so.6")
    stack.add("ext.so", linkage(wants=[name, versioned], modules="ext"), needed)
    assert ids(stack.findings()) == [("error", "abi.missing")]


def test_what_a_missing_library_would_define_is_left_to_the_proof_of_closure(stack: Stack) -> None:
    stack.add("ext.so", linkage(wants=["cudaMalloc"], modules="ext"), "libcudart.so.12")
    assert stack.findings() == []


def test_what_torch_loads_for_everybody_is_there_for_its_extensions(stack: Stack) -> None:
    stack.add("torch/lib/libtorch_global_deps.so", linkage(), "libcudart.so.12")
    stack.add("torch/lib/libcudart.so.12", linkage("cudaMalloc"))
    stack.add("torch/lib/ext.so", linkage(wants=["cudaMalloc"], modules="ext"), "libtorch_cpu.so")
    assert stack.findings() == []
    stack.add("other.so", linkage(wants=["cudaMalloc"], modules="other"))
    assert [one.subject for one in stack.findings()] == [f"{SITE}/other.so"]


def test_a_version_must_be_the_one_that_is_wanted(stack: Stack) -> None:
    stack.add("libv.so", linkage("f@V1 f@@ g"))
    wanted = [Wanted("f", "V1", "libv.so"), Wanted("f"), Wanted("g", "V7", "libv.so")]
    stack.add("ext.so", linkage(wants=[*wanted, Wanted("f", "V2", "libv.so")], modules="ext"), "libv.so")
    (found,) = stack.findings()
    assert found.evidence == "1 of the 4 symbols that it wants are defined by nothing that is loaded: f@V2"


def test_without_an_interpreter_its_symbols_are_trusted(stack: Stack) -> None:
    stack.add("ext.so", linkage(wants=["PyModule_Create2", "_Py_Dealloc"], modules="ext"))
    assert stack.findings(program=None) == []
    assert ids(stack.findings()) == [("error", "abi.missing")]


def test_another_program_has_nothing_of_pythons(stack: Stack) -> None:
    stack.add("bin/tool", linkage(wants=["PyModule_Create2"]), program=True)
    assert ids(stack.findings()) == [("warning", "abi.unloadable")]


def test_pythons_program_itself(stack: Stack) -> None:
    stack.linkage[PYTHON] = linkage(wants=["nowhere", Wanted("ceil", "GLIBC_2.2.5", "libm.so.6")])
    assert ids(stack.findings()) == [("error", "abi.missing")]


@pytest.mark.parametrize(
    "tag",
    ["cpython-310-x86_64-linux-gnu", "cpython-312t-x86_64-linux-gnu", "cpython-312-aarch64-linux-gnu", "pypy310-pp73"],
)
def test_an_extension_of_another_python_is_never_imported(stack: Stack, tag: str) -> None:
    path = f"ext.{tag}.so"
    stack.add(path, linkage(wants=["PyOld"], modules="ext"))
    (found,) = stack.findings()
    assert (found.severity, found.id) == ("warning", "abi.tag")
    assert tag in found.evidence
    stack.add("ext.abi3.so", linkage(modules="ext"))
    assert ids(stack.findings()) == [("note", "abi.tag")]


@pytest.mark.parametrize("tag", ["", ".abi3", ".cpython-312", ".cpython-312-x86_64-linux-gnu"])
def test_extensions_of_this_python(stack: Stack, tag: str) -> None:
    stack.add(f"ext{tag}.so", linkage(modules="ext"))
    assert stack.findings() == []


def test_bindings_tell_what_holds_an_extension_to_its_pytorch(stack: Stack) -> None:
    stack.add(
        "torch_user/bound.so",
        linkage(wants=[TENSOR, "aoti_torch_empty", "Py_IncRef"], modules="bound"),
        "libtorch_cpu.so",
    )
    stack.add("torch_user/stable.so", linkage(wants=["aoti_torch_empty"], modules="stable"), "libtorch_cpu.so")
    stack.add("torch_user/plain.so", linkage(wants=["Py_IncRef"], modules="plain"))
    for name in ("bound", "stable"):
        path = f"{SITE}/torch_user/{name}.so"
        stack.objects[path] = Elf(machine="x86_64", bits=64, kind="shared", needed=("libtorch_cpu.so",), dynamic=True,
                                  rpath=("$ORIGIN/../torch/lib",), versions_needed={}, size=1)  # fmt: skip
    abi = stack.check()
    rows = [(one.path.rpartition("/")[2], one.kind, one.cxx, one.stable, one.wanted) for one in abi.bindings]
    assert rows == [
        ("bound.so", "bound to this libtorch", 1, 1, 3), ("plain.so", "stable-abi", 0, 0, 1),
        ("stable.so", "stable-abi", 0, 1, 1),
    ]  # fmt: skip
    assert [one.evidence for one in abi.findings] == [
        "bound to this libtorch: 1 of its 3 symbols are PyTorch's C++, 1 are of PyTorch's stable C ABI",
        "stable-abi: 1 are of PyTorch's stable C ABI",
    ]
