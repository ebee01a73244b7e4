"""A simulated Ascend device behind the unmodified `torch_npu` wheel, for machines without an NPU."""
