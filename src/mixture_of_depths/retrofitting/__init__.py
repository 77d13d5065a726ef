"""Making a pretrained model skip: what skipping costs, who skips where, and the tuning."""
