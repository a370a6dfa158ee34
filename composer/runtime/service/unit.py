"""The text of a systemd unit that runs a bundle's server. Every setting and its reason: docs/reference/service.md."""

import shlex

from .spec import Service, ServiceError, own_program
from .supervisor import FINAL

#: The first line of our units; a file without it is somebody else's.
MARK = "# Written by compose-service; `compose-service install` replaces it. Settings of your own: systemctl edit"
#: RestartSteps= and RestartMaxDelaySec= came with this version.
_BACKOFF = 254
_BURST = 5

_LIMITS = ("LimitMEMLOCK=infinity", "LimitSTACK=64M", "LimitNOFILE=1048576", "TasksMax=infinity")
# What a manager without privileges can do for a service, too.
_HARDENING = (
    "NoNewPrivileges=yes", "LockPersonality=yes", "RestrictRealtime=yes", "RestrictSUIDSGID=yes",
    "RestrictNamespaces=yes", "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_IB",
    "SystemCallArchitectures=native",
    "SystemCallFilter=~@clock @cpu-emulation @module @mount @obsolete @raw-io @reboot @swap",
    "SystemCallErrorNumber=EPERM", "UMask=0077",
)  # fmt: skip
_SYSTEM_HARDENING = (
    "ProtectSystem=strict", "ProtectHome=read-only", "PrivateTmp=yes", "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes", "ProtectKernelLogs=yes", "ProtectControlGroups=yes", "ProtectClock=yes",
    "ProtectHostname=yes", "ProtectProc=invisible", "CapabilityBoundingSet=", "RemoveIPC=yes",
    "DevicePolicy=closed", "DeviceAllow=char-nvidia* rw", "DeviceAllow=char-infiniband* rw",
    "DeviceAllow=/dev/infiniband/rdma_cm rw", "DeviceAllow=char-gdrdrv rw",
)  # fmt: skip


def word(text: str) -> str:
    """One argument of a command line in a unit: quoted, and without specifiers and variables (systemd.service(5))."""
    return program(text).replace("$", "$$")


def program(text: str) -> str:
    """The program of a command line in a unit; systemd expands no variable in it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def command(text: str) -> list[str]:
    """The words of ExecStart= in a unit that `unit` wrote; none in another."""
    line = next((one for one in text.splitlines() if one.startswith("ExecStart=")), "")
    try:
        words = [one.replace("%%", "%") for one in shlex.split(line.partition("=")[2])]
    except ValueError:  # a quote that does not end, by another hand
        return []
    return [*words[:1], *(one.replace("$$", "$") for one in words[1:])]


def unit(service: Service, settings: str, *, user: bool, version: int, modprobe: str | None = None) -> str:
    """The unit's text; ServiceError for a program that systemd does not run.

    settings: the file of environment variables. user: for a user's manager, which cannot sandbox. version: of systemd.
    modprobe: NVIDIA's program that makes the device files, where there is one.
    """
    for path in (service.program, own_program(service)):
        if any(character in path for character in "'\"\\"):
            raise ServiceError(f"systemd runs no program with a quote or a backslash in its path: {path}",
                               "Move the bundle, or use --plain.")  # fmt: skip
    blocks = (_head(service, user=user), _process(service, settings, version), [*_LIMITS],
              _rights(service, user=user, modprobe=modprobe),
              ["[Install]", f"WantedBy={'default' if user else 'multi-user'}.target"])  # fmt: skip
    return MARK + "\n" + "\n".join("\n".join(block) + "\n" for block in blocks)


def _head(service: Service, *, user: bool) -> list[str]:
    # A device class has to be known to the kernel before the service is let near it, so the module comes first.
    order = [] if user else [
        "Wants=network-online.target modprobe@nvidia_uvm.service",
        "After=network-online.target modprobe@nvidia_uvm.service",
        "After=nvidia-persistenced.service nvidia-fabricmanager.service",
    ]  # fmt: skip
    return [
        "[Unit]", f"Description=SGLang server {service.name}", *order,
        f"StartLimitIntervalSec={_BURST * (service.start + 90)}", f"StartLimitBurst={_BURST}",
    ]  # fmt: skip


def _process(service: Service, settings: str, version: int) -> list[str]:
    backoff = ["RestartSteps=5", "RestartMaxDelaySec=60"] if version >= _BACKOFF else []
    cache = f"%C/compose/{service.name}"
    arguments = [word(one) for one in service.arguments]
    return [
        "[Service]", "Type=exec",
        f"Environment=WHEEL_COMPOSER_CACHE={cache} HF_HOME={cache}/huggingface",
        f"EnvironmentFile={settings.replace('%', '%%')}",
        f"CacheDirectory=compose/{service.name}",
        f"ExecStart={' '.join([program(service.program), *arguments])}",
        f"ExecStartPost={' '.join([program(own_program(service)), 'wait --', word(service.program), *arguments])}",
        f"TimeoutStartSec={service.start}", f"TimeoutStopSec={service.stop}", "KillMode=mixed",
        "Restart=on-failure", "RestartSec=5", *backoff,
        f"RestartPreventExitStatus={' '.join(map(str, sorted(FINAL)))}",
    ]  # fmt: skip


def _rights(service: Service, *, user: bool, modprobe: str | None) -> list[str]:
    if user:
        return [*_HARDENING]
    identity = f"User={service.run_as}" if service.run_as else "DynamicUser=yes"
    devices = [f"ExecStartPre=-+{program(modprobe)} -c 0 -u"] if modprobe else []
    writable = [f"ReadWritePaths={' '.join(map(program, service.writable))}"] if service.writable else []
    return [identity, *devices, *_HARDENING, *_SYSTEM_HARDENING, *writable]
