"""Pure functions of scores and hidden states to per-token losses: no state, no batch means."""
