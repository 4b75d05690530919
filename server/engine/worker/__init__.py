"""The workers' processes: n forward passes, the gate, one draw. Knows tensors and rows; decides no schedule."""
