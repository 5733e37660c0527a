"""The training step and everything it needs: device, optimizer, averages, guard, evaluation."""
