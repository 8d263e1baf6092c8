"""OpenVINO: GenAI's pipeline, and `OVModelForCausalLM` in our decoding loop."""
