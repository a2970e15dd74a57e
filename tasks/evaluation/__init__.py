"""What the evaluating stages wrote, read again and compared; and the processes and adapters in which they measure.

Figures in, differences and intervals out. How they are shown is reporting's, what is allowed is the gate's.
"""
