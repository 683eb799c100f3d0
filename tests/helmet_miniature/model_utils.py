"""Models of the miniature, and how prompts become tokens: the end of a context that is too long is cut."""


class LLM:
    def __init__(
        self,
        model_name,
        temperature=0.9,
        top_p=0.9,
        max_length=128,
        generation_max_length=8,
        generation_min_length=0,
        do_sample=True,
        stop_newline=False,
        use_chat_template=False,
        system_message="You are helpful.",
    ):
        self.model_name, self.temperature, self.top_p = model_name, temperature, top_p
        self.max_length, self.generation_max_length = max_length, generation_max_length
        self.do_sample, self.use_chat_template, self.system_message = do_sample, use_chat_template, system_message
        self.stops = ["\n", "\n\n"] if stop_newline else None


def tokenize(
    sample,
    data,
    tokenizer,
    max_length,
    generation_max_length,
    use_chat_template=False,
    continue_final_message=False,
    system_message="You are helpful.",
):
    def tokens():
        if not use_chat_template:
            return tokenizer([data["prompt_template"].format(**sample)])
        turns = [{"role": "user", "content": data["user_template"].format(**sample)}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer([text], add_special_tokens=False)

    found = tokens()
    excess = len(found["input_ids"][0]) - (max_length - generation_max_length)
    if excess > 0:
        places = tokenizer(sample["context"], return_offsets_mapping=True)["offset_mapping"]
        sample["context"] = sample["context"][: places[-excess][0]]
        found = tokens()
    return found
