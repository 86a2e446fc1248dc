"""The ablation: arms of the method on one cohort, paired seeds, one table (`docs/protocol.md`)."""
