"""The words that options take, as a shell completes them and `--help` shows them.

Without an import: a shell asks for them at every press of TAB, and torch alone takes ten times as long as the answer.
Tests compare them with what the commands accept.
"""

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
          "wide_resnet50_2", "wide_resnet101_2")
CIFAR = tuple(f"cifar_resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110))
ZOOS = {"torchvision": "torchvision.models", "timm": "timm"}  # prefix -> the module that has its models
SOURCES = "a model of fused_resnet.models, cifar_resnetDEPTH, torchvision:NAME, timm:NAME, or path.py:factory"
TENSORS = ("fp32", "bf16", "fp16")
DTYPES = ("fp32", "tf32", "bf16", "fp16")  # TF32 is no dtype of tensors, but a way to multiply fp32
BENCHED = (*DTYPES, "int8")
DEVICES = ("cpu", "cuda")
MODES = ("inference", "training")
# Of both modes, in order of value, as `bench.providers` has them.
PROVIDERS = ("eager", "eager_channels_last", "fused", "inductor_freezing", "openvino", "onnxruntime", "tensorrt",
             "compile", "compile_max_autotune", "fused_int8", "onnxruntime_int8", "openvino_int8", "fused_cuda",
             "fused_triton", "fused_cudnn", "fused_cpu", "fused_recompute")
SIZE = 224  # pixels of an edge, as `bench.pictures` has it
