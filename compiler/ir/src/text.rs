//! The text form: prints and parses, one statement a line.
//!
//! ```text
//! graph tiny-opt {
//!   weight @ffn.up.weight [256, 64] = load "fc1.weight"
//!   weight @k.weight [64, 64] = load "c_attn.weight" transposed rows 64..128
//!   weight @qkv.weight [192, 64] = concat @q.weight, @k.weight, @v.weight
//!   %0 = token_ids : ids
//!   %1 = embed_tokens %0 table=@embed.tokens : [T, 64]
//!   %2 = linear %1 weight=@ffn.up.weight norm=(@norm.weight, @norm.bias, 0.00001) act=relu : [T, 256]
//!   hidden %1
//!   logits %9
//! }
//! ```
//!
//! An absent part of a norm is written `_`. Comments run from `;` to the end of the line.

use crate::{
    Activation, Graph, HiddenState, Linear, Norm, Op, Rows, Type, ValueId, Weight, WeightId,
    WeightSource,
};
use std::{collections::HashMap, fmt, str::FromStr};

/// Text that is no graph: the author's mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct ParseError {
    /// Counted from 1.
    pub line: usize,
    /// What was found and what was needed.
    pub problem: String,
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Type::Ids => f.write_str("ids"),
            Type::Kv => f.write_str("kv"),
            Type::Rows {
                rows: Rows::Tokens,
                width,
            } => write!(f, "[T, {width}]"),
            Type::Rows {
                rows: Rows::Logits,
                width,
            } => write!(f, "[R, {width}]"),
        }
    }
}

impl Activation {
    /// The spelling of the text form.
    pub const fn name(self) -> &'static str {
        match self {
            Activation::Relu => "relu",
            Activation::GeluNew => "gelu_new",
        }
    }

    fn parse(name: &str) -> Option<Activation> {
        [Activation::Relu, Activation::GeluNew]
            .into_iter()
            .find(|activation| activation.name() == name)
    }
}

impl Op {
    /// The spelling of the text form.
    pub const fn name(&self) -> &'static str {
        match self {
            Op::TokenIds => "token_ids",
            Op::Positions => "positions",
            Op::EmbedTokens { .. } => "embed_tokens",
            Op::EmbedPositions { .. } => "embed_positions",
            Op::Matmul { .. } => "matmul",
            Op::Bias { .. } => "bias",
            Op::Activation(activation) => activation.name(),
            Op::Add => "add",
            Op::LayerNorm(_) => "layer_norm",
            Op::KvWrite { .. } => "kv_write",
            Op::Attention { .. } => "attention",
            Op::SelectLogitRows => "select_logit_rows",
            Op::Embed { .. } => "embed",
            Op::Linear(_) => "linear",
            Op::Qkv { .. } => "qkv",
        }
    }
}

/// Prints the graph. Values appear producers first, under their own ids.
impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "graph {} {{", self.name)?;
        for (_, weight) in self.weights() {
            write!(f, "  weight @{} {:?} = ", weight.name, weight.shape)?;
            match &weight.source {
                WeightSource::Load {
                    tensor,
                    transposed,
                    rows,
                } => {
                    write!(f, "load {tensor:?}")?;
                    if *transposed {
                        write!(f, " transposed")?;
                    }
                    if let Some(rows) = rows {
                        write!(f, " rows {}..{}", rows.start, rows.end)?;
                    }
                    writeln!(f)?;
                }
                WeightSource::Concat(parts) => {
                    let parts: Vec<String> = parts.iter().map(|&part| self.spell(part)).collect();
                    writeln!(f, "concat {}", parts.join(", "))?;
                }
            }
        }
        // A graph with a cycle is printed by rising id, for the person who looks for it.
        for value in self.schedule().unwrap_or_else(|| self.values()) {
            let node = self.node(value);
            write!(f, "  {value} = {}", node.op.name())?;
            for (position, operand) in self.operands(value).iter().enumerate() {
                write!(f, "{}{operand}", if position == 0 { " " } else { ", " })?;
            }
            for (key, text) in self.attributes(&node.op) {
                write!(f, " {key}={text}")?;
            }
            writeln!(f, " : {}", node.ty)?;
        }
        for state in &self.hidden_states {
            write!(f, "  hidden {}", state.value)?;
            if let Some(norm) = state.norm {
                write!(f, " norm={}", self.spell_norm(norm))?;
            }
            writeln!(f)?;
        }
        if let Some(logits) = self.logits {
            writeln!(f, "  logits {logits}")?;
        }
        writeln!(f, "}}")
    }
}

impl Graph {
    fn spell(&self, id: WeightId) -> String {
        format!("@{}", self.weight(id).name)
    }

    fn spell_norm(&self, norm: Norm) -> String {
        let part = |id: Option<WeightId>| id.map_or("_".to_owned(), |id| self.spell(id));
        format!("({}, {}, {})", part(norm.weight), part(norm.bias), norm.eps)
    }

    fn attributes(&self, op: &Op) -> Vec<(&'static str, String)> {
        match *op {
            Op::TokenIds | Op::Positions | Op::Activation(_) | Op::Add | Op::SelectLogitRows => {
                vec![]
            }
            Op::EmbedTokens { table } => vec![("table", self.spell(table))],
            Op::EmbedPositions { table, offset } => {
                vec![("table", self.spell(table)), ("offset", offset.to_string())]
            }
            Op::Matmul { weight } => vec![("weight", self.spell(weight))],
            Op::Bias { bias } => vec![("bias", self.spell(bias))],
            Op::LayerNorm(norm) => vec![("norm", self.spell_norm(norm))],
            Op::KvWrite { layer } => vec![("layer", layer.to_string())],
            Op::Attention {
                layer,
                heads,
                head_dim,
                scale,
            } => vec![
                ("layer", layer.to_string()),
                ("heads", heads.to_string()),
                ("head_dim", head_dim.to_string()),
                ("scale", scale.to_string()),
            ],
            Op::Embed { tokens, positions } => {
                let tokens = tokens.map(|table| ("tokens", self.spell(table)));
                let positions = positions.map(|(table, offset)| {
                    [
                        ("positions", self.spell(table)),
                        ("offset", offset.to_string()),
                    ]
                });
                tokens
                    .into_iter()
                    .chain(positions.into_iter().flatten())
                    .collect()
            }
            Op::Linear(linear) => self.linear_attributes(&linear),
            Op::Qkv { linear, layer } => {
                let mut attributes = self.linear_attributes(&linear);
                attributes.push(("layer", layer.to_string()));
                attributes
            }
        }
    }

    fn linear_attributes(&self, linear: &Linear) -> Vec<(&'static str, String)> {
        let parts = [
            Some(("weight", self.spell(linear.weight))),
            linear.norm.map(|norm| ("norm", self.spell_norm(norm))),
            linear.bias.map(|bias| ("bias", self.spell(bias))),
            linear
                .activation
                .map(|activation| ("act", activation.name().to_owned())),
            linear
                .residual_norm
                .map(|norm| ("residual_norm", self.spell_norm(norm))),
            (linear.rows == Rows::Logits).then(|| ("rows", "logits".to_owned())),
        ];
        parts.into_iter().flatten().collect()
    }
}

impl FromStr for Graph {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Graph, ParseError> {
        let mut parser = Parser::default();
        for (index, line) in text.lines().enumerate() {
            parser.statement(line).map_err(|problem| ParseError {
                line: index + 1,
                problem,
            })?;
        }
        if !parser.closed {
            let line = text.lines().count().max(1);
            return Err(ParseError {
                line,
                problem: "the text ends before `}`".to_owned(),
            });
        }
        Ok(parser.graph)
    }
}

type Parse<T> = Result<T, String>;

#[derive(Default)]
struct Parser {
    graph: Graph,
    opened: bool,
    closed: bool,
    weights: HashMap<String, WeightId>,
    values: HashMap<String, ValueId>,
}

impl Parser {
    fn statement(&mut self, line: &str) -> Parse<()> {
        let tokens = tokenize(line)?;
        let mut cursor = Cursor { tokens: &tokens };
        let Some(first) = cursor.take() else {
            return Ok(());
        };
        if !self.opened {
            if first != "graph" {
                return Err(format!("found {first:?}, needed is `graph NAME {{`"));
            }
            self.graph.name = cursor.word("a name")?.to_owned();
            cursor.expect("{")?;
            self.opened = true;
            return cursor.end();
        }
        if self.closed {
            return Err(format!("found {first:?} after `}}`"));
        }
        match first {
            "}" => self.closed = true,
            "weight" => self.weight(&mut cursor)?,
            "hidden" => {
                let value = self.value(&mut cursor)?;
                let mut attributes = self.parse_attributes(&mut cursor)?;
                let norm = attributes
                    .optional("norm")
                    .map(|text| self.norm(&text))
                    .transpose()?;
                attributes.end()?;
                self.graph.hidden_states.push(HiddenState { value, norm });
            }
            "logits" => {
                let value = self.value(&mut cursor)?;
                if self.graph.logits.replace(value).is_some() {
                    return Err("the logits are given twice".to_owned());
                }
            }
            name if name.starts_with('%') => self.node(name, &mut cursor)?,
            other => {
                return Err(format!(
                    "found {other:?}, needed is weight, %N, hidden, logits or `}}`"
                ));
            }
        }
        cursor.end()
    }

    fn weight(&mut self, cursor: &mut Cursor<'_>) -> Parse<()> {
        let name = cursor.weight_name()?.to_owned();
        cursor.expect("[")?;
        let mut shape = vec![cursor.number()?];
        while cursor.accept(",") {
            shape.push(cursor.number()?);
        }
        cursor.expect("]")?;
        cursor.expect("=")?;
        let source = match cursor.word("load or concat")? {
            "load" => {
                let tensor = cursor.string()?;
                let transposed = cursor.accept("transposed");
                let rows = match cursor.accept("rows") {
                    true => {
                        let start: usize = cursor.number()?;
                        cursor.expect("..")?;
                        let end: usize = cursor.number()?;
                        Some(start..end)
                    }
                    false => None,
                };
                WeightSource::Load {
                    tensor,
                    transposed,
                    rows,
                }
            }
            "concat" => {
                let mut parts = vec![self.weight_id(cursor.weight_name()?)?];
                while cursor.accept(",") {
                    parts.push(self.weight_id(cursor.weight_name()?)?);
                }
                WeightSource::Concat(parts)
            }
            other => return Err(format!("found {other:?}, needed is load or concat")),
        };
        let id = self.graph.add_weight(Weight {
            name: name.clone(),
            shape,
            source,
        });
        if self.weights.insert(name.clone(), id).is_some() {
            return Err(format!("@{name} is declared twice"));
        }
        Ok(())
    }

    fn node(&mut self, name: &str, cursor: &mut Cursor<'_>) -> Parse<()> {
        cursor.expect("=")?;
        let op_name = cursor.word("an operation")?.to_owned();
        let mut operands = vec![];
        if cursor.peek().is_some_and(|token| token.starts_with('%')) {
            operands.push(self.value(cursor)?);
            while cursor.accept(",") {
                operands.push(self.value(cursor)?);
            }
        }
        let mut attributes = self.parse_attributes(cursor)?;
        let op = self.op(&op_name, &mut attributes)?;
        attributes.end()?;
        cursor.expect(":")?;
        let ty = parse_type(cursor)?;
        let id = self.graph.add(op, ty, &operands);
        if self.values.insert(name.to_owned(), id).is_some() {
            return Err(format!("{name} is defined twice"));
        }
        Ok(())
    }

    fn op(&self, name: &str, attributes: &mut Attributes) -> Parse<Op> {
        let op = match name {
            "token_ids" => Op::TokenIds,
            "positions" => Op::Positions,
            "embed_tokens" => Op::EmbedTokens {
                table: self.weight_attribute(attributes, "table")?,
            },
            "embed_positions" => Op::EmbedPositions {
                table: self.weight_attribute(attributes, "table")?,
                offset: attributes.number("offset")?,
            },
            "matmul" => Op::Matmul {
                weight: self.weight_attribute(attributes, "weight")?,
            },
            "bias" => Op::Bias {
                bias: self.weight_attribute(attributes, "bias")?,
            },
            "add" => Op::Add,
            "layer_norm" => Op::LayerNorm(self.norm(&attributes.required("norm")?)?),
            "kv_write" => Op::KvWrite {
                layer: attributes.number("layer")?,
            },
            "attention" => Op::Attention {
                layer: attributes.number("layer")?,
                heads: attributes.number("heads")?,
                head_dim: attributes.number("head_dim")?,
                scale: attributes.number("scale")?,
            },
            "select_logit_rows" => Op::SelectLogitRows,
            "embed" => {
                let table = |text: String| self.weight_id(weight_name(&text)?);
                let tokens = attributes.optional("tokens").map(table).transpose()?;
                let positions = match attributes.optional("positions").map(table).transpose()? {
                    Some(positions) => Some((positions, attributes.number("offset")?)),
                    None => None,
                };
                Op::Embed { tokens, positions }
            }
            "linear" => Op::Linear(self.linear(attributes)?),
            "qkv" => Op::Qkv {
                linear: self.linear(attributes)?,
                layer: attributes.number("layer")?,
            },
            other => match Activation::parse(other) {
                Some(activation) => Op::Activation(activation),
                None => return Err(format!("there is no operation {other:?}")),
            },
        };
        Ok(op)
    }

    fn linear(&self, attributes: &mut Attributes) -> Parse<Linear> {
        let weight = |text: String| self.weight_id(weight_name(&text)?);
        let norm = |text: String| self.norm(&text);
        Ok(Linear {
            weight: self.weight_attribute(attributes, "weight")?,
            norm: attributes.optional("norm").map(norm).transpose()?,
            bias: attributes.optional("bias").map(weight).transpose()?,
            activation: match attributes.optional("act") {
                Some(name) => Some(
                    Activation::parse(&name)
                        .ok_or_else(|| format!("there is no activation {name:?}"))?,
                ),
                None => None,
            },
            residual_norm: attributes.optional("residual_norm").map(norm).transpose()?,
            rows: match attributes.optional("rows").as_deref() {
                None => Rows::Tokens,
                Some("logits") => Rows::Logits,
                Some(other) => {
                    return Err(format!(
                        "found rows={other}, needed is rows=logits or nothing"
                    ));
                }
            },
        })
    }

    fn norm(&self, text: &str) -> Parse<Norm> {
        let parts: Option<Vec<&str>> = text
            .strip_prefix('(')
            .and_then(|text| text.strip_suffix(')'))
            .map(|text| text.split(',').map(str::trim).collect());
        let Some([weight, bias, eps]) = parts.as_deref() else {
            return Err(format!(
                "found {text:?}, needed is a norm (@weight, @bias, eps)"
            ));
        };
        let part = |text: &str| match text {
            "_" => Ok(None),
            name => self.weight_id(weight_name(name)?).map(Some),
        };
        Ok(Norm {
            weight: part(weight)?,
            bias: part(bias)?,
            eps: eps
                .parse()
                .map_err(|_| format!("found {eps:?}, needed is a number"))?,
        })
    }

    fn parse_attributes(&self, cursor: &mut Cursor<'_>) -> Parse<Attributes> {
        let mut attributes = Attributes(HashMap::new());
        while let Some(key) = cursor
            .peek()
            .filter(|&token| token != ":")
            .map(str::to_owned)
        {
            cursor.take();
            cursor.expect("=")?;
            let mut text = cursor.word("a value")?.to_owned();
            if text == "(" {
                while !text.ends_with(')') {
                    text.push_str(cursor.word("`)`")?);
                }
            }
            if attributes.0.insert(key.clone(), text).is_some() {
                return Err(format!("the attribute {key} is given twice"));
            }
        }
        Ok(attributes)
    }

    fn weight_attribute(&self, attributes: &mut Attributes, key: &str) -> Parse<WeightId> {
        self.weight_id(weight_name(&attributes.required(key)?)?)
    }

    fn weight_id(&self, name: &str) -> Parse<WeightId> {
        self.weights
            .get(name)
            .copied()
            .ok_or_else(|| format!("@{name} is not declared"))
    }

    fn value(&self, cursor: &mut Cursor<'_>) -> Parse<ValueId> {
        let name = cursor.word("a value")?;
        self.values
            .get(name)
            .copied()
            .ok_or_else(|| format!("{name} is not defined"))
    }
}

fn parse_type(cursor: &mut Cursor<'_>) -> Parse<Type> {
    match cursor.word("a type")? {
        "ids" => Ok(Type::Ids),
        "kv" => Ok(Type::Kv),
        "[" => {
            let rows = match cursor.word("T or R")? {
                "T" => Rows::Tokens,
                "R" => Rows::Logits,
                other => return Err(format!("found {other:?}, needed is T or R")),
            };
            cursor.expect(",")?;
            let width = cursor.number()?;
            cursor.expect("]")?;
            Ok(Type::Rows { rows, width })
        }
        other => Err(format!(
            "found {other:?}, needed is a type: ids, kv, [T, width] or [R, width]"
        )),
    }
}

fn weight_name(text: &str) -> Parse<&str> {
    text.strip_prefix('@')
        .ok_or_else(|| format!("found {text:?}, needed is a weight (@name)"))
}

/// Attributes of a statement; each is taken once, what is left over is an error.
struct Attributes(HashMap<String, String>);

impl Attributes {
    fn optional(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    fn required(&mut self, key: &str) -> Parse<String> {
        self.optional(key)
            .ok_or_else(|| format!("the attribute {key} is missing"))
    }

    fn number<T: FromStr>(&mut self, key: &str) -> Parse<T> {
        let text = self.required(key)?;
        text.parse()
            .map_err(|_| format!("found {key}={text}, needed is a number"))
    }

    fn end(self) -> Parse<()> {
        match self.0.keys().min() {
            Some(key) => Err(format!("there is no attribute {key} here")),
            None => Ok(()),
        }
    }
}

struct Cursor<'a> {
    tokens: &'a [String],
}

impl<'a> Cursor<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.tokens.first().map(String::as_str)
    }

    fn take(&mut self) -> Option<&'a str> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        Some(first)
    }

    fn accept(&mut self, token: &str) -> bool {
        let found = self.peek() == Some(token);
        if found {
            self.take();
        }
        found
    }

    fn word(&mut self, needed: &str) -> Parse<&'a str> {
        self.take()
            .ok_or_else(|| format!("the line ends, needed is {needed}"))
    }

    fn expect(&mut self, token: &str) -> Parse<()> {
        match self.word(&format!("`{token}`"))? {
            found if found == token => Ok(()),
            found => Err(format!("found {found:?}, needed is `{token}`")),
        }
    }

    fn number<T: FromStr>(&mut self) -> Parse<T> {
        let text = self.word("a number")?;
        text.parse()
            .map_err(|_| format!("found {text:?}, needed is a number"))
    }

    fn string(&mut self) -> Parse<String> {
        let text = self.word("a string")?;
        match text
            .strip_prefix('"')
            .and_then(|text| text.strip_suffix('"'))
        {
            Some(text) => Ok(text.to_owned()),
            None => Err(format!(
                "found {text:?}, needed is a string in double quotes"
            )),
        }
    }

    fn weight_name(&mut self) -> Parse<&'a str> {
        weight_name(self.word("a weight")?)
    }

    fn end(&self) -> Parse<()> {
        match self.peek() {
            Some(token) => Err(format!("found {token:?} after the end of the statement")),
            None => Ok(()),
        }
    }
}

/// Words, numbers, strings without escapes, and the punctuation that separates them.
fn tokenize(line: &str) -> Parse<Vec<String>> {
    const PUNCTUATION: &str = "{}[](),=:";
    let mut tokens = vec![];
    let mut rest = line.trim_start();
    while let Some(first) = rest.chars().next() {
        if first == ';' {
            break;
        }
        let length = if PUNCTUATION.contains(first) {
            1
        } else if rest.starts_with("..") {
            2
        } else if first == '"' {
            let end = rest[1..].find('"').ok_or("a string is not closed")?;
            if rest[1..=end].contains('\\') {
                return Err("strings have no escapes".to_owned());
            }
            end + 2
        } else {
            rest.char_indices()
                .find(|&(at, char)| {
                    char.is_whitespace()
                        || PUNCTUATION.contains(char)
                        || char == ';'
                        || char == '"'
                        || rest[at..].starts_with("..")
                })
                .map_or(rest.len(), |(at, _)| at)
        };
        tokens.push(rest[..length].to_owned());
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}
