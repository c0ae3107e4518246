"""The adaptive drafter: trained on the hidden states of rollouts, on workers that would idle."""
