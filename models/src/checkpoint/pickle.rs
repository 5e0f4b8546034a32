//! A restricted unpickler for the `data.pkl` of torch checkpoints.
//!
//! A stack machine over the opcodes that `torch.save` writes for a state dict. Nothing is imported
//! or called: the few globals below are names that the machine knows how to build, and any other
//! global or opcode is refused by name. Values live in one arena and refer to each other by index,
//! so that neither cycles nor depth matter; memory is linear in the length of the pickle, which is
//! bounded.

use std::{collections::HashMap, ops::Range};

use super::SourceDType;

/// Longest pickle that is read. That of a 175-billion-parameter model has about 1 MB.
pub const PICKLE_LIMIT_BYTES: u64 = 16 << 20;

const MAX_VALUES: usize = 1 << 20;
const MAX_STACK: usize = 1 << 20;
const MAX_TENSORS: usize = 1 << 18;
const MAX_NAME_BYTES: usize = 1024;
const MAX_KEY_BYTES: usize = 64;
const MAX_RANK: usize = 8;

/// A tensor that a pickle describes: a strided view of a storage. Nothing here was checked against
/// the storage yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorView {
    /// Element type of the storage.
    pub dtype: SourceDType,
    /// Name of the storage: the archive holds it as `data/<key>`.
    pub storage_key: String,
    /// Elements of the storage, as the pickle says.
    pub storage_elements: u64,
    /// First element of the view.
    pub offset: u64,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// Elements from one index to the next, by dimension.
    pub stride: Vec<u64>,
}

/// Why a pickle is refused. All of them are the file's doing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PickleError {
    /// The pickle imports something that a state dict of tensors has no use for.
    #[error(
        "the pickle asks for {module}.{name}; kiln builds tensors only and runs nothing from \
         checkpoints: save the model's state dict, or convert it to safetensors"
    )]
    Global {
        /// The Python module.
        module: String,
        /// The name in it.
        name: String,
    },
    /// The pickle uses an opcode that torch.save does not write for a state dict.
    #[error(
        "the pickle uses opcode {name} (0x{opcode:02x}) at byte {position}; needed: what \
         torch.save writes for a state dict of tensors"
    )]
    Opcode {
        /// The opcode.
        opcode: u8,
        /// Its name in Python's pickletools.
        name: &'static str,
        /// Where it stands.
        position: usize,
    },
    /// The pickle ends within an instruction.
    #[error("the pickle ends at byte {position}, within an instruction; download the file again")]
    Truncated {
        /// Its length.
        position: usize,
    },
    /// An instruction finds something else on the stack than it needs.
    #[error("the pickle is malformed at byte {position}: needed {needed}")]
    Malformed {
        /// Where the instruction stands.
        position: usize,
        /// What it needed.
        needed: &'static str,
    },
    /// Some entry of the state dict is no tensor.
    #[error("entry {name:?} of the pickle is {found}; needed: a dictionary of tensors by name")]
    NotTensor {
        /// The entry.
        name: String,
        /// What it is.
        found: &'static str,
    },
    /// The pickle is larger than any state dict is.
    #[error("the pickle has more than {limit} {what}; no state dict has as many")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
}

/// Reads a pickled state dict: its tensors, by name, in the order of the pickle.
pub fn parse_state_dict(pickle: &[u8]) -> Result<Vec<(String, TensorView)>, PickleError> {
    if pickle.len() as u64 > PICKLE_LIMIT_BYTES {
        return Err(PickleError::Limit {
            what: "bytes",
            limit: PICKLE_LIMIT_BYTES as usize,
        });
    }
    let mut machine = Machine {
        pickle,
        position: 0,
        opcode_at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let root = machine.run()?;
    machine.state_dict(root)
}

/// Index of a value in the arena.
#[derive(Clone, Copy)]
struct Id(u32);

/// What the machine can hold.
enum Item {
    None,
    Bool,
    Int(i64),
    Float,
    /// A range of the pickle that was checked to be UTF-8.
    Text(Range<usize>),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage {
        dtype: SourceDType,
        key: Range<usize>,
        elements: u64,
    },
    Tensor(Tensor),
}

/// A global that may be named. Only the first three may be called.
#[derive(Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(SourceDType),
}

#[derive(Clone)]
struct Tensor {
    /// Arena index of a storage.
    storage: Id,
    offset: u64,
    shape: Vec<u64>,
    stride: Vec<u64>,
}

impl Global {
    fn find(module: &str, name: &str) -> Option<Global> {
        let storage = |dtype| Some(Global::Storage(dtype));
        match (module, name) {
            ("collections", "OrderedDict") => Some(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
            ("torch", "DoubleStorage") => storage(SourceDType::F64),
            ("torch", "FloatStorage") => storage(SourceDType::F32),
            ("torch", "HalfStorage") => storage(SourceDType::F16),
            ("torch", "BFloat16Storage") => storage(SourceDType::Bf16),
            ("torch", "LongStorage") => storage(SourceDType::I64),
            ("torch", "IntStorage") => storage(SourceDType::I32),
            ("torch", "ShortStorage") => storage(SourceDType::I16),
            ("torch", "CharStorage") => storage(SourceDType::I8),
            ("torch", "ByteStorage") => storage(SourceDType::U8),
            ("torch", "BoolStorage") => storage(SourceDType::Bool),
            _ => None,
        }
    }
}

impl Item {
    /// What the value is, for messages.
    fn kind(&self) -> &'static str {
        match self {
            Item::None => "None",
            Item::Bool => "a boolean",
            Item::Int(_) => "an integer",
            Item::Float => "a float",
            Item::Text(_) => "a string",
            Item::Tuple(_) => "a tuple",
            Item::List(_) => "a list",
            Item::Dict(_) => "a dictionary",
            Item::Global(_) => "a global",
            Item::Storage { .. } => "a storage",
            Item::Tensor(_) => "a tensor",
        }
    }
}

struct Machine<'a> {
    pickle: &'a [u8],
    position: usize,
    /// Where the current instruction starts.
    opcode_at: usize,
    values: Vec<Item>,
    stack: Vec<Id>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    /// Runs to STOP and gives the value on top.
    fn run(&mut self) -> Result<Id, PickleError> {
        loop {
            self.opcode_at = self.position;
            let opcode = self.byte()?;
            match opcode {
                op::PROTO => {
                    let protocol = self.byte()?;
                    if !(2..=5).contains(&protocol) {
                        return Err(self.malformed("pickle protocol 2 to 5"));
                    }
                }
                op::FRAME => {
                    self.take(8)?;
                }
                op::STOP => return self.pop(),
                op::MARK => {
                    if self.marks.len() >= MAX_STACK {
                        return Err(PickleError::Limit {
                            what: "marks",
                            limit: MAX_STACK,
                        });
                    }
                    self.marks.push(self.stack.len());
                }
                op::POP => {
                    self.pop()?;
                }
                op::POP_MARK => {
                    self.pop_to_mark()?;
                }

                op::NONE => self.push(Item::None)?,
                op::NEWTRUE | op::NEWFALSE => self.push(Item::Bool)?,
                op::BINFLOAT => {
                    self.take(8)?;
                    self.push(Item::Float)?;
                }
                op::BININT => {
                    let bytes = self.array::<4>()?;
                    self.push(Item::Int(i64::from(i32::from_le_bytes(bytes))))?;
                }
                op::BININT1 => {
                    let value = self.byte()?;
                    self.push(Item::Int(i64::from(value)))?;
                }
                op::BININT2 => {
                    let bytes = self.array::<2>()?;
                    self.push(Item::Int(i64::from(u16::from_le_bytes(bytes))))?;
                }
                op::LONG1 => self.long()?,
                op::BINUNICODE => {
                    let len = self.u32()? as usize;
                    self.text(len)?;
                }
                op::SHORT_BINUNICODE => {
                    let len = self.byte()? as usize;
                    self.text(len)?;
                }
                op::BINUNICODE8 => {
                    let len = u64::from_le_bytes(self.array()?);
                    self.text(usize::try_from(len).unwrap_or(usize::MAX))?;
                }

                op::EMPTY_TUPLE => self.push(Item::Tuple(Vec::new()))?,
                op::EMPTY_LIST => self.push(Item::List(Vec::new()))?,
                op::EMPTY_DICT => self.push(Item::Dict(Vec::new()))?,
                op::TUPLE => {
                    let items = self.pop_to_mark()?;
                    self.push(Item::Tuple(items))?;
                }
                op::TUPLE1 | op::TUPLE2 | op::TUPLE3 => {
                    let count = usize::from(opcode - op::TUPLE1) + 1;
                    let items = (0..count)
                        .map(|_| self.pop())
                        .collect::<Result<Vec<_>, _>>()?;
                    self.push(Item::Tuple(items.into_iter().rev().collect()))?;
                }
                op::APPEND => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                op::APPENDS => {
                    let items = self.pop_to_mark()?;
                    self.append(items)?;
                }
                op::SETITEM => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set_items(vec![key, value])?;
                }
                op::SETITEMS => {
                    let items = self.pop_to_mark()?;
                    self.set_items(items)?;
                }

                op::BINGET => {
                    let slot = u32::from(self.byte()?);
                    self.recall(slot)?;
                }
                op::LONG_BINGET => {
                    let slot = self.u32()?;
                    self.recall(slot)?;
                }
                op::BINPUT => {
                    let slot = u32::from(self.byte()?);
                    self.memoize(slot)?;
                }
                op::LONG_BINPUT => {
                    let slot = self.u32()?;
                    self.memoize(slot)?;
                }
                op::MEMOIZE => {
                    let slot = self.memo.len() as u32;
                    self.memoize(slot)?;
                }

                op::GLOBAL => {
                    let module = self.line()?;
                    let name = self.line()?;
                    self.global(module, name)?;
                }
                op::STACK_GLOBAL => {
                    let name = self.pop_text()?;
                    let module = self.pop_text()?;
                    self.global(module, name)?;
                }
                op::BINPERSID => self.storage()?,
                op::REDUCE => self.reduce()?,
                op::BUILD => self.build()?,
                _ => {
                    return Err(PickleError::Opcode {
                        opcode,
                        name: op::refused_name(opcode),
                        position: self.opcode_at,
                    });
                }
            }
        }
    }

    /// The tensors of the finished state dict.
    fn state_dict(&self, root: Id) -> Result<Vec<(String, TensorView)>, PickleError> {
        let Item::Dict(entries) = self.item(root) else {
            let found = self.item(root).kind();
            return Err(PickleError::NotTensor {
                name: "(the whole)".to_owned(),
                found,
            });
        };
        if entries.len() > MAX_TENSORS {
            return Err(PickleError::Limit {
                what: "tensors",
                limit: MAX_TENSORS,
            });
        }
        let mut tensors = Vec::with_capacity(entries.len());
        for &(key, value) in entries {
            let Item::Text(name) = self.item(key) else {
                let found = self.item(key).kind();
                return Err(PickleError::NotTensor {
                    name: "(a key)".to_owned(),
                    found,
                });
            };
            if name.len() > MAX_NAME_BYTES {
                return Err(PickleError::Limit {
                    what: "bytes in a tensor's name",
                    limit: MAX_NAME_BYTES,
                });
            }
            let name = self.text_of(name);
            let tensor = match self.item(value) {
                Item::Tensor(tensor) => tensor,
                other => {
                    return Err(PickleError::NotTensor {
                        name,
                        found: other.kind(),
                    });
                }
            };
            // `rebuild_tensor` made sure that this is a storage.
            let Item::Storage {
                dtype,
                key,
                elements,
            } = self.item(tensor.storage)
            else {
                return Err(PickleError::NotTensor {
                    name,
                    found: "a tensor without storage",
                });
            };
            let view = TensorView {
                dtype: *dtype,
                storage_key: self.text_of(key),
                storage_elements: *elements,
                offset: tensor.offset,
                shape: tensor.shape.clone(),
                stride: tensor.stride.clone(),
            };
            tensors.push((name, view));
        }
        Ok(tensors)
    }

    // Instructions.

    fn append(&mut self, mut items: Vec<Id>) -> Result<(), PickleError> {
        let top = self.top()?;
        match self.item_mut(top) {
            Item::List(list) => {
                list.append(&mut items);
                Ok(())
            }
            _ => Err(self.malformed("a list to append to")),
        }
    }

    fn set_items(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(self.malformed("keys and values in pairs"));
        }
        let top = self.top()?;
        match self.item_mut(top) {
            Item::Dict(entries) => {
                entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
                Ok(())
            }
            _ => Err(self.malformed("a dictionary to set items of")),
        }
    }

    /// An integer of up to eight bytes; a longer one is nothing that a tensor needs.
    fn long(&mut self) -> Result<(), PickleError> {
        let len = usize::from(self.byte()?);
        let bytes = self.take(len)?;
        if len > 8 {
            return Err(self.malformed("an integer of at most 8 bytes"));
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut wide = if negative { [0xff; 8] } else { [0; 8] };
        wide[..len].copy_from_slice(bytes);
        self.push(Item::Int(i64::from_le_bytes(wide)))
    }

    fn text(&mut self, len: usize) -> Result<(), PickleError> {
        let start = self.position;
        let bytes = self.take(len)?;
        if std::str::from_utf8(bytes).is_err() {
            return Err(self.malformed("a string in UTF-8"));
        }
        self.push(Item::Text(start..start + len))
    }

    fn global(&mut self, module: String, name: String) -> Result<(), PickleError> {
        match Global::find(&module, &name) {
            Some(global) => self.push(Item::Global(global)),
            None => Err(PickleError::Global { module, name }),
        }
    }

    /// BINPERSID: ("storage", storage type, key, location, elements).
    fn storage(&mut self) -> Result<(), PickleError> {
        let needed = "('storage', type, key, location, elements) as a persistent id";
        let id = self.pop()?;
        let Item::Tuple(fields) = self.item(id) else {
            return Err(self.malformed(needed));
        };
        let &[tag, kind, key, _location, elements] = fields.as_slice() else {
            return Err(self.malformed(needed));
        };
        let item = match (
            self.item(tag),
            self.item(kind),
            self.item(key),
            self.item(elements),
        ) {
            (
                Item::Text(tag),
                &Item::Global(Global::Storage(dtype)),
                Item::Text(key),
                &Item::Int(elements),
            ) if &self.pickle[tag.clone()] == b"storage" && key.len() <= MAX_KEY_BYTES => {
                let Ok(elements) = u64::try_from(elements) else {
                    return Err(self.malformed("a storage size that is not negative"));
                };
                Item::Storage {
                    dtype,
                    key: key.clone(),
                    elements,
                }
            }
            _ => return Err(self.malformed(needed)),
        };
        self.push(item)
    }

    fn reduce(&mut self) -> Result<(), PickleError> {
        let arguments = self.pop()?;
        let callable = self.pop()?;
        let Item::Tuple(arguments) = self.item(arguments) else {
            return Err(self.malformed("a tuple of arguments"));
        };
        let Item::Global(global) = self.item(callable) else {
            return Err(self.malformed("a global to call"));
        };
        let item = match global {
            Global::OrderedDict if arguments.is_empty() => Item::Dict(Vec::new()),
            Global::OrderedDict => return Err(self.malformed("OrderedDict without arguments")),
            Global::RebuildTensor => self.rebuild_tensor(arguments)?,
            Global::RebuildParameter => match arguments.first().map(|&data| self.item(data)) {
                Some(Item::Tensor(tensor)) => Item::Tensor(tensor.clone()),
                _ => return Err(self.malformed("a tensor as the data of a parameter")),
            },
            Global::Storage(_) => return Err(self.malformed("no call of a storage type")),
        };
        self.push(item)
    }

    /// (storage, offset, shape, stride, requires_grad, hooks[, metadata]).
    fn rebuild_tensor(&self, arguments: &[Id]) -> Result<Item, PickleError> {
        let &[storage, offset, shape, stride, ..] = arguments else {
            return Err(self.malformed("_rebuild_tensor_v2 with storage, offset, shape and stride"));
        };
        if !matches!(self.item(storage), Item::Storage { .. }) {
            return Err(self.malformed("a storage under the tensor"));
        }
        let &Item::Int(offset) = self.item(offset) else {
            return Err(self.malformed("an integer as the tensor's offset"));
        };
        let Ok(offset) = u64::try_from(offset) else {
            return Err(self.malformed("a tensor offset that is not negative"));
        };
        let (shape, stride) = (self.sizes(shape)?, self.sizes(stride)?);
        if shape.len() != stride.len() {
            return Err(self.malformed("as many strides as dimensions"));
        }
        Ok(Item::Tensor(Tensor {
            storage,
            offset,
            shape,
            stride,
        }))
    }

    fn sizes(&self, tuple: Id) -> Result<Vec<u64>, PickleError> {
        let needed = "a tuple of sizes that are not negative";
        let Item::Tuple(items) = self.item(tuple) else {
            return Err(self.malformed(needed));
        };
        if items.len() > MAX_RANK {
            return Err(PickleError::Limit {
                what: "dimensions of a tensor",
                limit: MAX_RANK,
            });
        }
        items
            .iter()
            .map(|&item| match self.item(item) {
                Item::Int(size) => u64::try_from(*size).map_err(|_| self.malformed(needed)),
                _ => Err(self.malformed(needed)),
            })
            .collect()
    }

    /// torch hangs `_metadata` onto the state dict; it says nothing about the tensors.
    fn build(&mut self) -> Result<(), PickleError> {
        self.pop()?;
        let top = self.top()?;
        match self.item(top) {
            Item::Dict(_) => Ok(()),
            _ => Err(self.malformed("a dictionary to set the state of")),
        }
    }

    // The stack, the arena, the memo.

    fn push(&mut self, item: Item) -> Result<(), PickleError> {
        if self.values.len() >= MAX_VALUES {
            return Err(PickleError::Limit {
                what: "values",
                limit: MAX_VALUES,
            });
        }
        self.values.push(item);
        self.push_id(Id(self.values.len() as u32 - 1))
    }

    fn push_id(&mut self, id: Id) -> Result<(), PickleError> {
        if self.stack.len() >= MAX_STACK {
            return Err(PickleError::Limit {
                what: "values on the stack",
                limit: MAX_STACK,
            });
        }
        self.stack.push(id);
        Ok(())
    }

    /// Values above the innermost mark only: an instruction cannot reach below it.
    fn pop(&mut self) -> Result<Id, PickleError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(self.malformed("a value on the stack"));
        }
        self.stack
            .pop()
            .ok_or_else(|| self.malformed("a value on the stack"))
    }

    fn top(&self) -> Result<Id, PickleError> {
        self.stack
            .last()
            .copied()
            .ok_or_else(|| self.malformed("a value on the stack"))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let mark = self
            .marks
            .pop()
            .ok_or_else(|| self.malformed("a mark on the stack"))?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn pop_text(&mut self) -> Result<String, PickleError> {
        let id = self.pop()?;
        match self.item(id) {
            Item::Text(range) if range.len() <= MAX_NAME_BYTES => Ok(self.text_of(range)),
            _ => Err(self.malformed("the name of a global")),
        }
    }

    fn recall(&mut self, slot: u32) -> Result<(), PickleError> {
        let id = self.memo.get(&slot).copied();
        let id = id.ok_or_else(|| self.malformed("a memo slot that was filled"))?;
        self.push_id(id)
    }

    fn memoize(&mut self, slot: u32) -> Result<(), PickleError> {
        if self.memo.len() >= MAX_VALUES {
            return Err(PickleError::Limit {
                what: "memo slots",
                limit: MAX_VALUES,
            });
        }
        let top = self.top()?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn item(&self, id: Id) -> &Item {
        &self.values[id.0 as usize]
    }

    fn item_mut(&mut self, id: Id) -> &mut Item {
        &mut self.values[id.0 as usize]
    }

    fn text_of(&self, range: &Range<usize>) -> String {
        String::from_utf8_lossy(&self.pickle[range.clone()]).into_owned()
    }

    fn malformed(&self, needed: &'static str) -> PickleError {
        PickleError::Malformed {
            position: self.opcode_at,
            needed,
        }
    }

    // The bytes.

    fn take(&mut self, len: usize) -> Result<&[u8], PickleError> {
        let end = self
            .position
            .checked_add(len)
            .filter(|&end| end <= self.pickle.len());
        let end = end.ok_or(PickleError::Truncated {
            position: self.pickle.len(),
        })?;
        let bytes = &self.pickle[self.position..end];
        self.position = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, PickleError> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, PickleError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn line(&mut self) -> Result<String, PickleError> {
        let rest = &self.pickle[self.position..];
        let Some(len) = rest
            .iter()
            .take(MAX_NAME_BYTES)
            .position(|&byte| byte == b'\n')
        else {
            return Err(self.malformed("a global's name, ended by a newline"));
        };
        let line = String::from_utf8_lossy(&rest[..len]).into_owned();
        self.position += len + 1;
        Ok(line)
    }
}

/// Opcodes, named as in Python's pickletools.
mod op {
    pub(super) const MARK: u8 = b'(';
    pub(super) const STOP: u8 = b'.';
    pub(super) const POP: u8 = b'0';
    pub(super) const POP_MARK: u8 = b'1';
    pub(super) const BINFLOAT: u8 = b'G';
    pub(super) const BININT: u8 = b'J';
    pub(super) const BININT1: u8 = b'K';
    pub(super) const BININT2: u8 = b'M';
    pub(super) const NONE: u8 = b'N';
    pub(super) const BINPERSID: u8 = b'Q';
    pub(super) const REDUCE: u8 = b'R';
    pub(super) const BINUNICODE: u8 = b'X';
    pub(super) const EMPTY_LIST: u8 = b']';
    pub(super) const APPEND: u8 = b'a';
    pub(super) const BUILD: u8 = b'b';
    pub(super) const GLOBAL: u8 = b'c';
    pub(super) const APPENDS: u8 = b'e';
    pub(super) const BINGET: u8 = b'h';
    pub(super) const LONG_BINGET: u8 = b'j';
    pub(super) const BINPUT: u8 = b'q';
    pub(super) const LONG_BINPUT: u8 = b'r';
    pub(super) const SETITEM: u8 = b's';
    pub(super) const TUPLE: u8 = b't';
    pub(super) const EMPTY_TUPLE: u8 = b')';
    pub(super) const SETITEMS: u8 = b'u';
    pub(super) const EMPTY_DICT: u8 = b'}';
    pub(super) const PROTO: u8 = 0x80;
    pub(super) const TUPLE1: u8 = 0x85;
    pub(super) const TUPLE2: u8 = 0x86;
    pub(super) const TUPLE3: u8 = 0x87;
    pub(super) const NEWTRUE: u8 = 0x88;
    pub(super) const NEWFALSE: u8 = 0x89;
    pub(super) const LONG1: u8 = 0x8a;
    pub(super) const SHORT_BINUNICODE: u8 = 0x8c;
    pub(super) const BINUNICODE8: u8 = 0x8d;
    pub(super) const STACK_GLOBAL: u8 = 0x93;
    pub(super) const MEMOIZE: u8 = 0x94;
    pub(super) const FRAME: u8 = 0x95;

    /// The name of an opcode that is not executed.
    pub(super) const fn refused_name(opcode: u8) -> &'static str {
        match opcode {
            b'2' => "DUP",
            b'B' => "BINBYTES",
            b'C' => "SHORT_BINBYTES",
            b'F' => "FLOAT",
            b'I' => "INT",
            b'L' => "LONG",
            b'P' => "PERSID",
            b'S' => "STRING",
            b'T' => "BINSTRING",
            b'U' => "SHORT_BINSTRING",
            b'V' => "UNICODE",
            b'd' => "DICT",
            b'g' => "GET",
            b'i' => "INST",
            b'l' => "LIST",
            b'o' => "OBJ",
            b'p' => "PUT",
            0x81 => "NEWOBJ",
            0x82 => "EXT1",
            0x83 => "EXT2",
            0x84 => "EXT4",
            0x8b => "LONG4",
            0x8e => "BINBYTES8",
            0x8f => "EMPTY_SET",
            0x90 => "ADDITEMS",
            0x91 => "FROZENSET",
            0x92 => "NEWOBJ_EX",
            0x96 => "BYTEARRAY8",
            0x97 => "NEXT_BUFFER",
            0x98 => "READONLY_BUFFER",
            _ => "(unknown)",
        }
    }
}
