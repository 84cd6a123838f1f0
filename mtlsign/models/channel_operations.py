"""Names of the operations whose effect on channels is known (`channel_flow.py`)."""

from __future__ import annotations

#: Operations that move numbers without changing them; they move labels in the same way.
MOVES = frozenset({
    "_reshape_alias", "_unsafe_view", "as_strided", "cat", "channel_shuffle", "chunk", "expand",
    "flatten", "flip", "index_select", "movedim", "narrow", "native_channel_shuffle", "permute",
    "pixel_shuffle", "pixel_unshuffle", "repeat", "reshape", "roll", "select", "slice", "split",
    "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unfold", "unsqueeze", "view"
})  # fmt: skip
#: Operations on single numbers, and copies.
POINTWISE = frozenset({
    "_log_softmax", "_prelu_kernel", "_softmax", "_to_copy", "abs", "alias", "alpha_dropout", "celu",
    "clamp", "clamp_", "clamp_max", "clamp_min", "clamp_min_", "clone", "contiguous", "copy_", "cos",
    "detach", "div", "div_", "dropout", "elu", "elu_", "erf", "exp", "feature_dropout", "gelu",
    "hardsigmoid", "hardsigmoid_", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "leaky_relu",
    "leaky_relu_", "lift_fresh", "log", "log_sigmoid", "logit", "mish", "mish_", "mul", "mul_",
    "native_dropout", "neg", "pow", "prelu", "reciprocal", "relu", "relu_", "rsqrt", "selu", "sigmoid",
    "sigmoid_", "sign", "silu", "silu_", "sin", "softplus", "sqrt", "square", "tanh", "tanh_",
    "threshold", "to"
})  # fmt: skip
#: Operations on pairs of numbers.
BINARY = frozenset({
    "add", "add_", "addcmul", "addcmul_", "div", "div_", "lerp", "maximum", "minimum", "mul", "mul_",
    "pow", "rsub", "sub", "sub_", "where"
})  # fmt: skip
#: Operations on the positions of one channel.
POOLS = frozenset({
    "_adaptive_avg_pool2d", "_upsample_bilinear2d_aa", "adaptive_avg_pool2d", "adaptive_max_pool2d",
    "avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d", "max_pool2d_with_indices",
    "mkldnn_max_pool2d", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_nearest2d"
})  # fmt: skip
#: Reductions over dimensions.
REDUCTIONS = frozenset({
    "amax", "amin", "linalg_vector_norm", "max", "mean", "min", "norm", "std", "sum", "var"
})  # fmt: skip
#: Operations that add positions.
PADS = frozenset({
    "_pad_circular", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"
})  # fmt: skip
#: Convolutions: input, weight, bias, ..., groups.
CONVOLUTIONS = frozenset({
    "_convolution", "conv2d", "convolution", "cudnn_convolution", "mkldnn_convolution"
})  # fmt: skip
#: Batch norms: input, weight, bias, running mean, running variance.
BATCH_NORMS = frozenset({
    "_batch_norm_no_update", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "native_batch_norm"
})  # fmt: skip
#: Of these, the operations that a mix of channels can pass: copies, sums, and means over positions.
LINEAR = frozenset({
    *MOVES, *CONVOLUTIONS, *BATCH_NORMS, "_adaptive_avg_pool2d", "_to_copy", "adaptive_avg_pool2d", "add",
    "add_", "addmm", "alias", "alpha_dropout", "avg_pool1d", "avg_pool2d", "clone", "constant_pad_nd",
    "contiguous", "copy_", "detach", "dropout", "feature_dropout", "lift_fresh", "linear", "mean", "mm",
    "native_dropout", "reflection_pad2d", "replication_pad2d", "sub", "sub_", "sum", "to"
})  # fmt: skip
