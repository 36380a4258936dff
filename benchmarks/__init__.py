"""What eventtrain costs, measured beside the hand-written loop and its peers."""
