"""What a run would load, take and cost, before anything is loaded."""
