//! `config.json`: what is read, what is refused, and in which words.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::Path;

use kiln_ir::DType;
use kiln_models::{
    builtin::{builtin, builtin_names, parameters},
    config::{
        Activation, Architecture, GenerationDefaults, GptqConfig, ModelConfig, NormPlacement,
    },
};
use serde_json::{Value, json};

fn opt() -> Value {
    json!({
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 300,
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128,
        "max_position_embeddings": 128, "word_embed_proj_dim": 64, "torch_dtype": "float16",
    })
}

fn gpt2() -> Value {
    json!({
        "model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4,
        "n_positions": 128,
    })
}

fn with(mut config: Value, changes: Value) -> Value {
    config
        .as_object_mut()
        .unwrap()
        .extend(changes.as_object().unwrap().clone());
    config
}

fn parse(config: &Value) -> ModelConfig {
    ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap()
}

#[track_caller]
fn refused(config: &Value, message: &str) {
    let error = ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap_err();
    assert_eq!(error.to_string(), message);
}

#[test]
fn opt_is_normalised() {
    let config = parse(&opt());
    assert_eq!(config.architecture, Architecture::Opt);
    assert_eq!(config.position_rows(), 130);
    assert_eq!(config.attention_scale, 0.25);
    assert_eq!(config.dtype, DType::F16);
    assert_eq!(
        (config.bos_token_id, config.pad_token_id),
        (Some(2), Some(1))
    );
    assert_eq!(config.eos_token_ids, [2]);
    assert!(config.final_norm && config.tied_head && config.linear_bias && config.norm_affine);

    let post = parse(&with(
        opt(),
        json!({"do_layer_norm_before": false, "word_embed_proj_dim": 32, "enable_bias": false}),
    ));
    assert_eq!(post.norm_placement, NormPlacement::Post);
    assert!(!post.final_norm && post.has_projections() && !post.linear_bias);

    assert!(!parse(&with(opt(), json!({"_remove_final_layer_norm": true}))).final_norm);
    assert!(!parse(&with(opt(), json!({"tie_word_embeddings": false}))).tied_head);
    let ids = with(opt(), json!({"eos_token_id": [5, 6], "bos_token_id": null}));
    assert_eq!(parse(&ids).eos_token_ids, [5, 6]);
    assert_eq!(parse(&ids).bos_token_id, None);
}

#[test]
fn gpt2_is_normalised() {
    let config = parse(&gpt2());
    assert_eq!(config.ffn_size, 256);
    assert_eq!(config.activation, Activation::GeluNew);
    assert_eq!((config.dtype, config.position_offset), (DType::F32, 0));
    assert_eq!(config.eos_token_ids, [50256]);
    assert_eq!(config.layer_attention_scale(1), 0.25);

    let flags = json!({
        "n_inner": 100, "scale_attn_weights": false, "scale_attn_by_inverse_layer_idx": true,
        "reorder_and_upcast_attn": true, "layer_norm_epsilon": 1e-6, "hidden_size": 64,
    });
    let config = parse(&with(gpt2(), flags));
    assert_eq!(config.ffn_size, 100);
    assert_eq!(config.layer_attention_scale(0), 1.0);
    assert_eq!(config.layer_attention_scale(3), 0.25);
    assert_eq!(config.norm_eps, 1e-6);
}

#[test]
fn what_would_change_the_computation_is_refused_by_name() {
    refused(
        &with(opt(), json!({"activation_function": "gelu"})),
        "config.json: field \"activation_function\" is \"gelu\", which kiln does not support; \
         supported: relu, gelu_new, gelu_pytorch_tanh, gelu_fast",
    );
    refused(
        &with(opt(), json!({"model_type": "llama"})),
        "config.json: field \"model_type\" is \"llama\", which kiln does not support; supported: \
         opt, gpt2",
    );
    refused(
        &with(
            opt(),
            json!({"architectures": ["OPTForSequenceClassification"]}),
        ),
        "config.json: field \"architectures\" is [\"OPTForSequenceClassification\"], which kiln \
         does not support; supported: OPTForCausalLM, OPTModel",
    );
    refused(
        &json!({"hidden_size": 64}),
        "config.json: field \"model_type\" is missing; needed: one of opt, gpt2",
    );
    refused(
        &with(gpt2(), json!({"add_cross_attention": true})),
        "config.json: field \"add_cross_attention\" is true, which kiln does not support; \
         supported: false (decoder-only models)",
    );
    refused(
        &with(opt(), json!({"rope_theta": 10000.0})),
        "config.json: key \"rope_theta\" (value 10000.0) is unknown to kiln for opt models and may \
         change what the model computes; remove it from the file if it does not",
    );
    // Unset, it changes nothing.
    parse(&with(
        opt(),
        json!({"rope_theta": null, "use_rope": false, "extra": {}}),
    ));
    refused(
        &with(opt(), json!({"torch_dtype": "float8_e4m3fn"})),
        "config.json: field \"torch_dtype\" is \"float8_e4m3fn\", which kiln does not support; \
         supported: float32, float16, bfloat16",
    );
}

#[test]
fn sizes_are_checked() {
    refused(
        &with(opt(), json!({"hidden_size": null})),
        "config.json: field \"hidden_size\" is missing; needed: a positive integer",
    );
    refused(
        &with(opt(), json!({"num_hidden_layers": -1})),
        "config.json: field \"num_hidden_layers\" is -1; needed: a positive integer",
    );
    refused(
        &with(gpt2(), json!({"n_layer": 0})),
        "config.json: field \"n_layer\" is 0; needed: an integer from 1 to 16383",
    );
    refused(
        &with(gpt2(), json!({"n_head": 5})),
        "config.json: field \"n_head\" is 5; needed: a divisor of the hidden size 64",
    );
    refused(
        &with(gpt2(), json!({"n_head": 0})),
        "config.json: field \"n_head\" is 0; needed: an integer from 1 to 1048575",
    );
    refused(
        &with(opt(), json!({"vocab_size": 1u64 << 40})),
        "config.json: field \"vocab_size\" is 1099511627776; needed: an integer from 1 to 16777215",
    );
    refused(
        &with(gpt2(), json!({"n_embd": u64::MAX, "n_head": 1})),
        "config.json: field \"n_embd\" is 18446744073709551615; needed: an integer from 1 to \
         1048575",
    );
    refused(
        &with(gpt2(), json!({"hidden_size": 32})),
        "config.json: field \"hidden_size\" is 32; needed: the value of \"n_embd\"",
    );
    refused(
        &with(opt(), json!({"eos_token_id": "</s>"})),
        "config.json: field \"eos_token_id\" is \"</s>\"; needed: a token id, a list of token ids, \
         or null",
    );
    refused(
        &json!([1]),
        "config.json is not a JSON object: [1]; download the checkpoint again",
    );
}

#[test]
fn generation_defaults_override() {
    let path = Path::new("generation_config.json");
    let text = r#"{"eos_token_id": [7, 8], "bos_token_id": 9, "transformers_version": "4.4"}"#;
    let defaults = GenerationDefaults::from_json(text, path).unwrap();
    let config = parse(&opt()).with_generation_defaults(&defaults);
    assert_eq!(
        (config.bos_token_id, config.eos_token_ids),
        (Some(9), vec![7, 8])
    );

    let silent = GenerationDefaults::from_json("{}", path).unwrap();
    assert_eq!(
        parse(&opt()).with_generation_defaults(&silent),
        parse(&opt())
    );
}

#[test]
fn hugging_face_json_reads_back() {
    let path = Path::new("config.json");
    for name in builtin_names() {
        let config = builtin(name).unwrap();
        assert_eq!(
            ModelConfig::from_json(&config.to_hf_json(), path).unwrap(),
            config,
            "{name}"
        );
    }
    let odd = json!({
        "scale_attn_weights": false, "scale_attn_by_inverse_layer_idx": true, "n_inner": 96,
        "tie_word_embeddings": false, "eos_token_id": [1, 2], "dtype": "bfloat16",
    });
    for config in [
        with(gpt2(), odd),
        with(opt(), json!({"_remove_final_layer_norm": true})),
    ] {
        let config = parse(&config);
        assert_eq!(
            ModelConfig::from_json(&config.to_hf_json(), path).unwrap(),
            config
        );
    }
}

#[test]
fn builtin_parameter_counts() {
    let published = [
        ("opt-125m", 125_239_296),
        ("opt-350m", 331_196_416),
        ("opt-1.3b", 1_315_758_080),
        ("opt-2.7b", 2_651_596_800),
        ("opt-6.7b", 6_658_473_984),
        ("opt-13b", 12_853_473_280),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ];
    for (name, count) in published {
        assert_eq!(parameters(&builtin(name).unwrap()), count, "{name}");
    }
    // Published in round figures only.
    for (name, billions) in [("opt-30b", 30.0), ("opt-66b", 66.0), ("opt-175b", 175.0)] {
        let count = parameters(&builtin(name).unwrap()) as f64 / 1e9;
        assert!((count / billions - 1.0).abs() < 0.01, "{name}: {count}");
    }
    assert!(builtin("opt-1b").is_none());
    for name in builtin_names() {
        builtin(name).unwrap().check(Path::new(name)).unwrap();
    }
}

fn quantised(changes: Value) -> Value {
    let gptq = json!({
        "quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": false, "sym": true,
        "damp_percent": 0.01, "checkpoint_format": "gptq", "lm_head": false, "dynamic": null,
    });
    with(opt(), json!({"quantization_config": with(gptq, changes)}))
}

#[test]
fn gptq_is_read() {
    let gptq = |changes| parse(&quantised(changes)).quantisation.unwrap();
    let expected = GptqConfig {
        bits: 4,
        group_size: Some(64),
        zeros_less_one: true,
    };
    assert_eq!(gptq(json!({})), expected);
    assert_eq!(
        gptq(json!({"checkpoint_format": null, "desc_act": true})),
        expected
    );
    let second =
        json!({"bits": 8, "group_size": -1, "checkpoint_format": null, "format": "gptq_v2"});
    let expected = GptqConfig {
        bits: 8,
        group_size: None,
        zeros_less_one: false,
    };
    assert_eq!(gptq(second), expected);
    assert_eq!(gptq(json!({"group_size": null})).group_size, Some(128));
    assert_eq!(parse(&opt()).quantisation, None);
    assert_eq!(
        parse(&with(opt(), json!({"quantization_config": null}))).quantisation,
        None
    );
}

#[test]
fn other_quantisations_are_refused_by_name() {
    let field = |changes, message: &str| {
        let message = format!("config.json: field \"quantization_config.{message}");
        refused(&quantised(changes), &message);
    };
    let no = "which kiln does not support; supported:";
    field(
        json!({"quant_method": "awq"}),
        &format!("quant_method\" is \"awq\", {no} gptq; else give the unquantised checkpoint"),
    );
    field(json!({"bits": 3}), &format!("bits\" is 3, {no} 4, 8"));
    field(json!({"bits": null}), &format!("bits\" is null, {no} 4, 8"));
    field(
        json!({"checkpoint_format": "marlin"}),
        &format!("checkpoint_format\" is \"marlin\", {no} gptq, gptq_v2"),
    );
    field(
        json!({"lm_head": true}),
        &format!("lm_head\" is true, {no} none"),
    );
    field(
        json!({"dynamic": {"-:fc1": {}}}),
        &format!("dynamic\" is {{\"-:fc1\":{{}}}}, {no} none"),
    );
    field(
        json!({"pack_dtype": "int16"}),
        &format!("pack_dtype\" is \"int16\", {no} int32"),
    );
    for size in [json!(0), json!(-2), json!("128"), json!(1u64 << 40)] {
        field(
            json!({"group_size": size}),
            &format!("group_size\" is {size}; needed: a positive integer or -1"),
        );
    }
    field(
        json!({"format": "gptq_v2"}),
        "format\" is \"gptq_v2\"; needed: the value of \"checkpoint_format\"",
    );
    field(
        json!({"desc_act": 1}),
        "desc_act\" is 1; needed: true or false",
    );
    refused(
        &with(opt(), json!({"quantization_config": 4})),
        "config.json: field \"quantization_config\" is 4; needed: an object",
    );
}
