"""Model cards: what a model is, where it comes from, how it is used, what was measured, what may be done with it."""

from diffusers_ext.cards.card import is_stale, merge_cards, write_card
from diffusers_ext.cards.inheritance import inherit
from diffusers_ext.cards.training import training_command, write_training_card


__all__ = ["inherit", "is_stale", "merge_cards", "training_command", "write_card", "write_training_card"]
