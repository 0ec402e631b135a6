"""Sites on the side of the cluster: what they are asked, what they answered, and the actor that stands for them."""
