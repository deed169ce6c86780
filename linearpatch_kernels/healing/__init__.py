"""What a cut or a merge took from the model, won back in closed form: by a map at the joint, or in the weights."""
