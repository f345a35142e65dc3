"""The small worlds that ship: data, networks, pretraining and exact readers of digits and shapes."""
