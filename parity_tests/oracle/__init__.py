"""The definitions: every operator as a plain NumPy float64 recurrence, written for reading and not for speed."""

from .selective_state_update import selective_state_update as selective_state_update
