"""Training what pruning left so that pruned weights stay zero: masked LoRA, distillation, block reconstruction."""
