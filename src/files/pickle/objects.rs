//! What a pickle describes, as plain objects: nothing that it names is called.
//!
//! Objects lie in one list and refer to each other by their places in it, as Python's do: an opcode makes at most one, so they are as
//! many as the pickle has bytes, however they contain each other.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};

/// An object's place among [`Objects`].
pub(super) type Id = usize;

#[derive(Debug)]
pub(super) enum Object<'a> {
    Bool(bool),
    Int(i64),
    Text(&'a str),
    Class {
        module: &'a str,
        name: &'a str,
    },
    Tuple(Vec<Id>),
    /// A list or a set.
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// What calling a class or a function would make, and what would be set in it.
    Call {
        callable: Id,
        args: Id,
        state: Option<Id>,
    },
    /// What lies outside the pickle, under this name.
    Stored(Id),
    /// None, numbers with a fraction, bytes.
    Other,
}

pub(super) struct Objects<'a> {
    all: Vec<Object<'a>>,
    pub root: Id,
    /// Bytes of the pickle.
    pub length: usize,
}

impl<'a> Objects<'a> {
    /// Runs the opcodes up to the pickle's end.
    ///
    /// # Errors
    /// An opcode that is not known or has no operands, a pickle that ends within one, or more objects than any state dict has.
    pub fn read(pickle: &'a [u8]) -> Result<Self> {
        let mut machine = Machine {
            rest: pickle,
            objects: Vec::new(),
            stack: Vec::new(),
            memo: HashMap::new(),
            budget: MOST_OBJECTS,
        };
        loop {
            match machine.number(1)? as u8 {
                b'.' => break,
                opcode => machine.step(opcode)?,
            }
        }
        let root = machine.pop()?;
        Ok(Self { length: pickle.len() - machine.rest.len(), all: machine.objects, root })
    }

    pub fn get(&self, id: Id) -> &Object<'a> {
        &self.all[id]
    }

    /// All objects, whatever holds them.
    pub fn all(&self) -> impl Iterator<Item = &Object<'a>> {
        self.all.iter()
    }

    pub fn text(&self, id: Id) -> Option<&'a str> {
        match self.all[id] {
            Object::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn int(&self, id: Id) -> Option<i64> {
        match self.all[id] {
            Object::Int(n) => Some(n),
            _ => None,
        }
    }

    /// The entries of a dict, or the attributes of an object.
    pub fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match &self.all[id] {
            Object::Dict(entries) => Some(entries),
            &Object::Call { state: Some(state), .. } => match &self.all[state] {
                Object::Dict(attributes) => Some(attributes),
                _ => None,
            },
            _ => None,
        }
    }

    /// # Errors
    /// It is no tuple, or a shorter one; says of `what`.
    pub fn tuple(&self, id: Id, at_least: usize, what: &str) -> Result<&[Id]> {
        match &self.all[id] {
            Object::Tuple(items) if items.len() >= at_least => Ok(items),
            _ => bail!("malformed: {what} is not a tuple of {at_least} or more"),
        }
    }

    pub fn is_class(&self, id: Id, module: &str, name: &str) -> bool {
        matches!(self.all[id], Object::Class { module: m, name: n } if m == module && n == name)
    }
}

/// A checkpoint of a large model has some ten thousand.
const MOST_OBJECTS: usize = 1 << 24;

struct Machine<'a> {
    rest: &'a [u8],
    objects: Vec<Object<'a>>,
    /// `None` is a mark.
    stack: Vec<Option<Id>>,
    memo: HashMap<u64, Id>,
    /// How many objects and entries may still be made.
    budget: usize,
}

impl<'a> Machine<'a> {
    fn bytes(&mut self, n: u64) -> Result<&'a [u8]> {
        let n = usize::try_from(n).unwrap_or(usize::MAX);
        self.rest.split_off(..n).context("malformed: the pickle ends within an opcode")
    }

    /// A little-endian number of up to eight bytes.
    fn number(&mut self, width: u64) -> Result<u64> {
        Ok(self.bytes(width)?.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    fn line(&mut self) -> Result<&'a str> {
        let length = self.rest.iter().position(|&byte| byte == b'\n').unwrap_or(self.rest.len());
        let line = self.bytes(length as u64 + 1)?;
        Ok(std::str::from_utf8(&line[..length]).context("malformed: a name is no text")?.trim_end_matches('\r'))
    }

    fn spend(&mut self, objects: usize) -> Result<()> {
        let left = self.budget.checked_sub(objects);
        self.budget = left.with_context(|| format!("malformed: the pickle has more than {MOST_OBJECTS} objects"))?;
        Ok(())
    }

    fn push(&mut self, object: Object<'a>) -> Result<()> {
        self.spend(1)?;
        self.stack.push(Some(self.objects.len()));
        self.objects.push(object);
        Ok(())
    }

    /// The object on top of the stack.
    fn top(&self) -> Result<Id> {
        self.stack.last().copied().flatten().context("malformed: an opcode of the pickle has no operand")
    }

    fn pop(&mut self) -> Result<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// The topmost `n` objects, in the order in which they were pushed.
    fn pop_many(&mut self, n: usize) -> Result<Vec<Id>> {
        let mut items = (0..n).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        items.reverse();
        Ok(items)
    }

    /// What was pushed since the last mark.
    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.stack.iter().rposition(Option::is_none).context("malformed: a mark is missing")?;
        let items = self.stack.drain(mark..).flatten().collect();
        Ok(items)
    }

    fn push_text(&mut self, width: u64) -> Result<()> {
        let length = self.number(width)?;
        let text = std::str::from_utf8(self.bytes(length)?);
        // strings of Python 2 may be any bytes
        self.push(text.map_or(Object::Other, Object::Text))
    }

    fn push_int(&mut self, width: u64) -> Result<()> {
        let bytes = self.bytes(width)?;
        if width > 8 {
            return self.push(Object::Other);
        }
        let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
        let start = if negative { -1 } else { 0 };
        self.push(Object::Int(bytes.iter().rev().fold(start, |n, &byte| n << 8 | i64::from(byte))))
    }

    /// Puts items into the list on top of the stack; other containers are not of interest.
    fn extend_list(&mut self, items: Vec<Id>) -> Result<()> {
        let list = self.top()?;
        if let Object::List(list) = &mut self.objects[list] {
            list.extend(items);
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: &[Id]) -> Result<()> {
        let dict = self.top()?;
        if let Object::Dict(dict) = &mut self.objects[dict] {
            dict.extend(pairs(items)?);
        }
        Ok(())
    }

    /// A call, of which only that of a dict is made.
    fn call(&mut self) -> Result<()> {
        let (args, callable) = (self.pop()?, self.pop()?);
        if !matches!(
            self.objects[callable],
            Object::Class { module: "collections", name: "OrderedDict" | "defaultdict" }
        ) {
            return self.push(Object::Call { callable, args, state: None });
        }
        let items = self.items_of_dict(args);
        self.spend(items.len())?;
        self.push(Object::Dict(items))
    }

    /// `OrderedDict([[key, value], ..])`, as Python 2 saves it.
    fn items_of_dict(&self, args: Id) -> Vec<(Id, Id)> {
        let Object::Tuple(args) = &self.objects[args] else { return Vec::new() };
        let Some(Object::List(items)) = args.first().map(|&id| &self.objects[id]) else { return Vec::new() };
        let pair = |&item: &Id| match &self.objects[item] {
            Object::Tuple(pair) | Object::List(pair) if pair.len() == 2 => Some((pair[0], pair[1])),
            _ => None,
        };
        items.iter().filter_map(pair).collect()
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            0x80 => self.bytes(1).map(drop),
            0x95 => self.bytes(8).map(drop), // a frame's length
            b'(' => {
                self.stack.push(None);
                Ok(())
            }
            b'0' => self.pop().map(drop),
            b'1' => self.pop_to_mark().map(drop),
            b'2' => {
                let top = self.top()?;
                self.stack.push(Some(top));
                Ok(())
            }
            b'N' => self.push(Object::Other),
            0x88 | 0x89 => self.push(Object::Bool(opcode == 0x88)),
            b'K' | b'M' => {
                let n = self.number(if opcode == b'K' { 1 } else { 2 })?;
                self.push(Object::Int(n as i64))
            }
            b'J' => self.push_int(4),
            // numbers and booleans of protocol 1, as text
            b'I' | b'L' => {
                let line = self.line()?;
                let number = line.trim_end_matches('L').parse().ok();
                self.push(match line {
                    "00" | "01" => Object::Bool(line == "01"),
                    _ => number.map_or(Object::Other, Object::Int),
                })
            }
            0x8a | 0x8b => {
                let width = self.number(if opcode == 0x8a { 1 } else { 4 })?;
                self.push_int(width)
            }
            b'G' => {
                self.bytes(8)?;
                self.push(Object::Other)
            }
            b'X' | b'T' => self.push_text(4),
            0x8c | b'U' => self.push_text(1),
            0x8d => self.push_text(8),
            b'C' | b'B' | 0x8e | 0x96 => {
                let length = self.number(match opcode {
                    b'C' => 1,
                    b'B' => 4,
                    _ => 8,
                })?;
                self.bytes(length)?;
                self.push(Object::Other)
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Object::Class { module, name })
            }
            0x93 => {
                let names = self.pop_many(2)?;
                let [Object::Text(module), Object::Text(name)] = [0, 1].map(|i| &self.objects[names[i]]) else {
                    bail!("malformed: a class whose name is no text");
                };
                let (module, name) = (*module, *name);
                self.push(Object::Class { module, name })
            }
            b'q' | b'r' | 0x94 => {
                let place = match opcode {
                    b'q' => self.number(1)?,
                    b'r' => self.number(4)?,
                    _ => self.memo.len() as u64,
                };
                let top = self.top()?;
                self.memo.insert(place, top);
                Ok(())
            }
            b'h' | b'j' => {
                let place = self.number(if opcode == b'h' { 1 } else { 4 })?;
                let id =
                    *self.memo.get(&place).with_context(|| format!("malformed: nothing is stored under {place}"))?;
                self.stack.push(Some(id));
                Ok(())
            }
            b')' => self.push(Object::Tuple(Vec::new())),
            b']' | 0x8f => self.push(Object::List(Vec::new())),
            b'}' => self.push(Object::Dict(Vec::new())),
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(opcode - 0x84))?;
                self.push(Object::Tuple(items))
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Object::Tuple(items))
            }
            b'l' | 0x91 => {
                let items = self.pop_to_mark()?;
                self.push(Object::List(items))
            }
            b'd' => {
                let items = pairs(&self.pop_to_mark()?)?;
                self.push(Object::Dict(items))
            }
            b'a' => {
                let item = self.pop()?;
                self.extend_list(vec![item])
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                self.extend_list(items)
            }
            b's' => {
                let items = self.pop_many(2)?;
                self.extend_dict(&items)
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.extend_dict(&items)
            }
            b'Q' => {
                let name = self.pop()?;
                self.push(Object::Stored(name))
            }
            b'R' | 0x81 => self.call(),
            0x92 => {
                self.pop()?; // arguments by name
                self.call()
            }
            b'b' => {
                let (set, target) = (self.pop()?, self.top()?);
                if let Object::Call { state, .. } = &mut self.objects[target] {
                    *state = Some(set);
                }
                Ok(())
            }
            other => bail!(
                "the pickle has the opcode {other:#04x}, which torch.save does not write; load it with PyTorch and save it again: \
                 torch.save(torch.load(\"FILE\", map_location=\"cpu\"), \"FILE\")"
            ),
        }
    }
}

/// key, value, key, value, ..
fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>> {
    let (pairs, rest) = items.as_chunks::<2>();
    ensure!(rest.is_empty(), "malformed: a key without a value");
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}
