"""`compose k8s`: Kubernetes manifests for a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from composer.deploy.folder import read_manifest, write_folder
from composer.deploy.manifests import Settings, Ways, render
from composer.errors import RecipeError
from composer.steps.load import load_targets

_DEFAULT = Settings(ways=Ways())


@click.command("k8s")
@click.argument("bundle", type=click.Path(path_type=Path), metavar="BUNDLE|FOLDER|MANIFEST.json")
@click.option("--output", "-o", type=click.Path(path_type=Path), default=Path("k8s"), show_default=True,
              help="The folder to write; it must not exist, or be empty.")  # fmt: skip
@click.option("--url", help="Init container: unpack the bundle from this address.")
@click.option(
    "--claim", metavar="CLAIM/FILE", help="Init container: unpack the bundle from a file of this volume claim."
)
@click.option("--oci", metavar="IMAGE", help="Mount the bundle as an OCI image volume (Kubernetes 1.33).")
@click.option("--host-path", metavar="FOLDER", help="Nodes have the bundle unpacked here.")
@click.option("--sha256", help="Of the bundle's file. Default: computed, when BUNDLE is the file.")
@click.option("--name", default=_DEFAULT.name, show_default=True, help="Of the Deployment and the Service.")
@click.option("--namespace", default=_DEFAULT.namespace, show_default=True)
@click.option("--tp", type=click.IntRange(1), default=_DEFAULT.tp, show_default=True, help="GPUs: SGLANG_TP_SIZE.")
@click.option("--port", type=click.IntRange(1024, 65535), default=_DEFAULT.port, show_default=True)
@click.option("--model", help="SGLANG_MODEL: a name on Hugging Face or a path. Default: the launcher's.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="A variable of the server. Not for tokens.")
@click.option("--image", default=_DEFAULT.image, show_default=True,
              help="Where the server and the init container run: glibc, and Python 3.14 for the latter.")  # fmt: skip
@click.option("--storage", default=_DEFAULT.storage, show_default=True, help="Size of the volume for models.")
@click.option("--storage-class", help="gp3, standard-rwo, managed-premium or another. Default: the cluster's.")
@click.option("--shm", default=_DEFAULT.shm, show_default=True, help="Size limit of /dev/shm.")
@click.option("--cpu", help="Request. Default: 4 for each GPU.")
@click.option("--memory", help="Request. Default: 16Gi for each GPU.")
@click.option("--gpu-product", "products", multiple=True, help="Only these GPUs (label nvidia.com/gpu.product).")
@click.option("--runtime-class", help="For clusters whose default runtime shows no GPU: nvidia.")
@click.option("--cold", is_flag=True, help="20 minutes to start instead of 10: the model is downloaded first.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def k8s(*, bundle: Path, output: Path, debug: bool, **options: Any) -> None:  # noqa: ANN401, ARG001
    """Write namespace, volume claim, Deployment and Service for a bundle, with a kustomize overlay for each way."""
    manifest, digest = read_manifest(bundle)
    ways = Ways(url=options.pop("url"), claim=options.pop("claim"), image=options.pop("oci"),
                host_path=options.pop("host_path"))  # fmt: skip
    options |= {"sha256": options["sha256"] or digest, "env": _variables(options["env"])}
    targets = load_targets()
    files = render(manifest, Settings(ways=ways, **options), sms=map(int, targets.sm),
                   features=targets.isa[manifest.target["isa"]].features)  # fmt: skip
    write_folder(output.absolute(), files)
    for name in files:
        if name.startswith("overlays/") and name.endswith("/kustomization.yaml"):
            click.echo(f"kubectl apply -k {output / name.removesuffix('/kustomization.yaml')}")


def _variables(pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise RecipeError(f"{pair!r} is not NAME=VALUE", where="--env")
    return dict(pair.split("=", 1) for pair in pairs)
