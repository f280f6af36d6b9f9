#!/usr/bin/env python3
"""Run the kernels' self-test on an emulated processor with AVX-512 VNNI and BF16, AVX-VNNI or AMX.

`scripts/emulate_cpu.py [ISA [part ...]]` builds tests/kernels/selftest statically, boots it on a Linux kernel in
Bochs, prints what it prints, and exits as it exits; 77 with the reason where Bochs or a kernel is missing, 3 where the
machine fails.

What it needs:
  Bochs 3.0 or newer (2.7 has no AVX-512 BF16) with the display "nogui" and without its debugger: $BOCHS,
  build/emulator/bochs, or the PATH. Debian's package is built the other way; from its source (`apt-get source bochs`,
  Debian 13), 4 minutes on two cores: `./configure --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex
  --enable-amx --enable-fpu --enable-pci --enable-all-optimizations --disable-plugins --disable-docbook --enable-cdrom
  --without-x11 --without-wx --with-nogui && make && cp bochs HALVE/build/emulator/`. For AMX, before `make`:
  `sed -i 's/if (op_flags & BX_PREPARE_AMX)/if (false)/' cpu/decoder/fetchdecode32.cc`. Linux lends tile registers only
  where it can take them away again (XFD), which Bochs 3.0 does not know; with this a program has them without asking,
  and one program is all that runs. And `sed -i 's/Bit32s(xbyte\\[/Bit8s(xbyte[/' cpu/avx/amx.cc`: Bochs 3.0 multiplies
  signed bytes of tdpbsud as unsigned ones.
  A kernel, bzImage: $KERNEL, build/emulator/boot/vmlinuz-*, or /boot/vmlinuz-*. On Debian and without installing it:
  `apt-get download linux-image-$VERSION-cloud-amd64 && dpkg -x linux-image-*.deb build/emulator`, where VERSION is what
  `apt-cache depends linux-image-cloud-amd64` names.
  g++, binutils, CMake (the build of halve itself).

There is no BIOS, disk or boot loader. Bochs puts one image (the kernel's parameters, an initramfs, the kernel) into
RAM, and a ROM of our own enters the kernel by its 32-bit protocol (Linux: Documentation/arch/x86/boot.rst).
"""

import argparse
import glob
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "build" / "emulator"
SKIPPED, BROKEN = 77, 3
IMAGE_AT = 0x1000000  # physical address of the image
MEMORY_MIB = 256
PARAMS_BYTES, PAGE = 0x2000, 0x1000
END = re.compile(r"^halve-init: (?:exit (\d+)|(.+))$", re.MULTILINE)

# The features that an instruction set needs beyond Skylake-X, in Bochs's words.
FEATURES = {
    "avx2": "",
    "avxvnni": "avx_vnni",
    "avx512": "avx512vnni",
    "avx512bf16": "avx512vnni,avx512bf16",
    "amx": "avx512vnni,avx512bf16,amx,amx_int8,amx_bf16",
}

# Skylake-X with these features: under the newer models of Bochs 3.0, Linux 6.1 stops before its first process. CPUID
# lists not all, hence --unchecked. `ips` is how fast time passes: of 10 million instructions a second, 250 ticks
# leave 40,000 for each.
BOCHSRC = """\
config_interface: textconfig
display_library: nogui
cpu: model=corei7_skylake_x, count=1, ips=10000000, add_features="{features}"
memory: guest={memory}, host={memory}
romimage: file={folder}/rom.bin, options=none
vga: extension=none
vgaromimage: file={folder}/vga.bin
optramimage1: file={folder}/image.bin, address={image_at:#x}
com1: enabled=1, mode=file, dev={folder}/serial.txt
log: {folder}/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
clock: sync=none
"""

# Real mode at the reset vector, then flat protected mode. Bochs gives RAM to pages in the order of their first use, and
# loads an image as if it lay there in one piece: reading every page of it first, in order, makes that true.
ROM = """\
.code16
start: cli
  lgdtl %cs:(table_register - start)
  movl %cr0, %eax
  orl $1, %eax
  movl %eax, %cr0
  ljmpl $0x10, $(0xffff0000 + (flat - start))
.code32
flat:
  movw $0x18, %ax
  movw %ax, %ds
  movw %ax, %es
  movw %ax, %ss
  movl $IMAGE_AT, %esi
  movl %esi, %ebx
touch:
  movb (%ebx), %al
  addl $0x1000, %ebx
  cmpl $IMAGE_END, %ebx
  jb touch
  xorl %ebp, %ebp
  xorl %edi, %edi
  xorl %ebx, %ebx
  movl $KERNEL_AT, %eax
  jmp *%eax
.align 8
table: .quad 0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
table_register:
  .word table_register - table - 1
  .long 0xffff0000 + (table - start)
.org 0xfff0
.code16
  jmp start
.org 0x10000
"""

# No devices but the serial port and the timer.
COMMAND_LINE = (
    "console=ttyS0 quiet loglevel=1 nokaslr mitigations=off acpi=off pci=off nolapic noapic nosmp nowatchdog "
    "lpj=40000 panic=-1"
)


class MissingError(Exception):
    """What is not there to emulate with, and how to get it."""


@dataclass(frozen=True)
class Emulator:
    """What boots the self-test."""

    bochs: Path
    kernel: Path


def find_emulator() -> Emulator:
    """Bochs and a kernel. Raises MissingError with the reason."""
    candidates = [os.environ.get("BOCHS"), str(TOOLS / "bochs"), shutil.which("bochs")]
    bochs = next((Path(c) for c in candidates if c and Path(c).is_file()), None)
    if bochs is None:
        raise MissingError("Bochs is not installed; see the head of scripts/emulate_cpu.py")
    told = subprocess.run([str(bochs), "--help", "cpu"], capture_output=True, text=True, check=False)
    version = re.search(r"Bochs x86 Emulator (\d+)\.(\d+)", told.stdout + told.stderr)
    if version is None or int(version[1]) < 3:
        found = version[0] if version else "what is there"
        raise MissingError(f"{bochs}: {found} has no AVX-512 BF16; Bochs 3.0 or newer is needed")
    named = os.environ.get("KERNEL")
    kernels = (
        [named] if named else [*sorted(glob.glob(f"{TOOLS}/boot/vmlinuz-*")), *sorted(glob.glob("/boot/vmlinuz-*"))]
    )
    kernel = next((Path(k) for k in kernels if Path(k).is_file()), None)
    if kernel is None:
        raise MissingError("no Linux kernel (bzImage) to boot; see the head of scripts/emulate_cpu.py")
    return Emulator(bochs, kernel)


def build(folder: Path) -> tuple[Path, Path]:
    """The self-test and the emulated machine's first process, built statically."""
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    steps = (
        [cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"],
        [cmake, "--build", str(folder), "--target", "halve_selftest", "selftest_init", "--parallel", "2"],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(step)} failed:\n{done.stdout}{done.stderr}")
    built = folder / "tests" / "kernels" / "selftest"
    return built / "halve_selftest", built / "selftest_init"


def cpio(files: dict[str, bytes]) -> bytes:
    """An initramfs of executables, in the "newc" format of cpio."""
    out = b""
    for number, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")], start=1):
        mode = 0o100755 if name != "TRAILER!!!" else 0
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        out += head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)
    return out


def boot_image(kernel: bytes, initramfs: bytes, command_line: str) -> tuple[bytes, int]:
    """The kernel's parameters, the initramfs and the kernel as they lie from IMAGE_AT on, and the kernel's address."""
    if kernel[0x202:0x206] != b"HdrS":
        raise SystemExit("the kernel is no bzImage: it has no setup header")
    setup_sectors = kernel[0x1F1] or 4
    params = bytearray(PAGE)
    params[0x1F1 : 0x202 + kernel[0x201]] = kernel[0x1F1 : 0x202 + kernel[0x201]]
    params[0x210] = 0xFF  # loader of no known type
    params[0x211] |= 1  # loaded high
    initramfs_at = IMAGE_AT + PARAMS_BYTES
    struct.pack_into("<II", params, 0x218, initramfs_at, len(initramfs))
    struct.pack_into("<I", params, 0x228, IMAGE_AT + PAGE)
    memory = [(0, 0x9FC00), (0x100000, MEMORY_MIB * 2**20 - 0x100000)]
    params[0x1E8] = len(memory)
    for i, (start, size) in enumerate(memory):
        struct.pack_into("<QQI", params, 0x2D0 + 20 * i, start, size, 1)
    line = command_line.encode()
    if len(line) >= PAGE:
        raise SystemExit(f"the command line is {len(line)} bytes long; at most {PAGE - 1} fit")
    alignment = 0x200000
    kernel_at = -(-(initramfs_at + len(initramfs)) // alignment) * alignment
    head = bytes(params) + line.ljust(PAGE, b"\0") + initramfs
    return head.ljust(kernel_at - IMAGE_AT, b"\0") + kernel[(setup_sectors + 1) * 512 :], kernel_at


def write_rom(folder: Path, image_bytes: int, kernel_at: int) -> None:
    """The ROM of ROM, assembled, and an empty one for the graphics card that Bochs insists on."""
    (folder / "rom.S").write_text(ROM)
    symbols = {"IMAGE_AT": IMAGE_AT, "IMAGE_END": IMAGE_AT + image_bytes, "KERNEL_AT": kernel_at}
    defined = [word for name, value in symbols.items() for word in ("--defsym", f"{name}={value:#x}")]
    subprocess.run(["as", "--32", *defined, "rom.S", "-o", "rom.o"], cwd=folder, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "rom.o", "rom.bin"], cwd=folder, check=True)
    empty = bytearray(512)
    empty[:4] = b"\x55\xaa\x01\xcb"  # signature, 512 bytes, a far return
    empty[511] = -sum(empty) & 0xFF
    (folder / "vga.bin").write_bytes(empty)


def run(emulator: Emulator, folder: Path, features: str, timeout_s: float) -> int:
    """Boot what lies in the folder, print what the machine prints as it comes, and return the self-test's status."""
    settings = BOCHSRC.format(folder=folder, memory=MEMORY_MIB, image_at=IMAGE_AT, features=features)
    (folder / "bochsrc").write_text(settings.replace(', add_features=""', ""))
    serial, shown, text = folder / "serial.txt", 0, ""
    command = [str(emulator.bochs), "-q", "-f", str(folder / "bochsrc")]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as bochs:
        deadline = time.monotonic() + timeout_s
        while True:
            ended = bochs.poll() is not None or time.monotonic() > deadline
            text = serial.read_text(errors="replace").replace("\r", "") if serial.exists() else ""
            whole = len(text) if ended else text.rfind("\n") + 1
            sys.stdout.write(text[shown:whole])
            sys.stdout.flush()
            shown = max(shown, whole)
            if ended or END.search(text[:whole]):
                break
            time.sleep(0.2)
        bochs.kill()
    end = END.search(text)
    if end and end[1]:
        return int(end[1])
    log = (folder / "bochs.log").read_text(errors="replace").splitlines() if (folder / "bochs.log").exists() else []
    if unknown := next((line for line in log if "unknown feature name" in line), None):
        print(f"skipped: this Bochs was built without what it takes ({unknown.strip()}); see the head of this script")
        return SKIPPED
    why = end[2] if end else f"no end within {timeout_s:g} s, or the machine stopped; Bochs's last words: {log[-3:]}"
    print(f"the emulated machine failed: {why}", file=sys.stderr)
    return BROKEN


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, boot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "words", nargs="*", default=["avx512bf16"], metavar="ISA [part ...]", help="given to the self-test"
    )
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="how long the machine may run")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "selftest", help="CMake's folder")
    parser.add_argument("--program", type=Path, help="another static program to run in place of the self-test")
    options = parser.parse_args(arguments)
    if options.words[0] not in FEATURES:
        parser.error(f"{options.words[0]!r} is not one of {', '.join(FEATURES)}")
    try:
        emulator = find_emulator()
    except MissingError as error:
        print(f"skipped: {error}")
        return SKIPPED
    selftest, init = build(options.build)
    with tempfile.TemporaryDirectory(prefix="halve-emulator-") as name:
        folder = Path(name)
        files = {"init": init.read_bytes(), "selftest": (options.program or selftest).read_bytes()}
        line = f"{COMMAND_LINE} -- selftest --unchecked {' '.join(options.words)}"
        image, kernel_at = boot_image(emulator.kernel.read_bytes(), cpio(files), line)
        (folder / "image.bin").write_bytes(image)
        write_rom(folder, len(image), kernel_at)
        return run(emulator, folder, FEATURES[options.words[0]], options.timeout_s)


if __name__ == "__main__":
    sys.exit(main())
