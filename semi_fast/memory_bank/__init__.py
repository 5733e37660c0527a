"""The memory bank: a module of buffers, and one fused update a step."""

from semi_fast.memory_bank.bank import MemoryBank, Rule

__all__ = ["MemoryBank", "Rule"]
