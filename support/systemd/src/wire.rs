//! The D-Bus wire format: values and messages to and from bytes. Pure. Little endian only, as all hosts of ours are.

use crate::Error;

/// Largest message taken; the protocol allows more than anything here has.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Bytes that tell how long a message is.
pub(crate) const FIXED_BYTES: usize = 16;
const LITTLE_ENDIAN: u8 = b'l';
const PROTOCOL: u8 = 1;

/// What a property can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Bool(bool),
    U32(u32),
    U64(u64),
    Text(String),
    Numbers(Vec<u32>),
    Bytes(Vec<u8>),
}

/// Writes values one after the other, each at its own alignment.
#[derive(Debug, Default)]
pub(crate) struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn byte(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.u32(u32::from(value));
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.align(4);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.align(8);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn text(&mut self, value: &str) {
        self.u32(value.len() as u32);
        self.bytes.extend(value.as_bytes());
        self.byte(0);
    }

    fn signature(&mut self, value: &str) {
        self.byte(value.len() as u8);
        self.bytes.extend(value.as_bytes());
        self.byte(0);
    }

    /// An array whose elements start at multiples of `alignment`.
    pub(crate) fn array(&mut self, alignment: usize, elements: impl FnOnce(&mut Encoder)) {
        self.u32(0);
        let length_at = self.bytes.len() - 4;
        self.align(alignment);
        let start = self.bytes.len();
        elements(self);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    pub(crate) fn structure(&mut self) {
        self.align(8);
    }

    pub(crate) fn variant(&mut self, value: &Value) {
        match value {
            Value::Bool(value) => {
                self.signature("b");
                self.bool(*value);
            }
            Value::U32(value) => {
                self.signature("u");
                self.u32(*value);
            }
            Value::U64(value) => {
                self.signature("t");
                self.u64(*value);
            }
            Value::Text(value) => {
                self.signature("s");
                self.text(value);
            }
            Value::Numbers(values) => {
                self.signature("au");
                self.array(4, |array| values.iter().for_each(|value| array.u32(*value)));
            }
            Value::Bytes(values) => {
                self.signature("ay");
                self.array(1, |array| array.bytes.extend(values));
            }
        }
    }

    fn header_field(&mut self, code: u8, signature: &str, value: &str) {
        self.structure();
        self.byte(code);
        self.signature(signature);
        if signature == "g" { self.signature(value) } else { self.text(value) }
    }
}

/// Reads values one after the other.
#[derive(Debug)]
pub(crate) struct Decoder<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Error> {
        let end = self.at.checked_add(count).ok_or(Error::Malformed("a length"))?;
        let taken = self.bytes.get(self.at..end).ok_or(Error::Malformed("it ends too early"))?;
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Error> {
        Ok(self.take(1)?[0])
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Error> {
        self.align(4);
        let bytes = self.take(4)?.try_into().map_err(|_| Error::Malformed("a number"))?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Error> {
        self.align(8);
        let bytes = self.take(8)?.try_into().map_err(|_| Error::Malformed("a number"))?;
        Ok(u64::from_le_bytes(bytes))
    }

    pub(crate) fn bool(&mut self) -> Result<bool, Error> {
        Ok(self.u32()? != 0)
    }

    fn of_length(&mut self, length: usize) -> Result<&'a str, Error> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| Error::Malformed("a text"))?;
        self.take(1)?;
        Ok(text)
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, Error> {
        let length = self.u32()? as usize;
        self.of_length(length)
    }

    pub(crate) fn signature(&mut self) -> Result<&'a str, Error> {
        let length = usize::from(self.byte()?);
        self.of_length(length)
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.at >= self.bytes.len()
    }

    /// Everything that is left must lie between here and there.
    fn until(&self, end: usize) -> Result<Decoder<'a>, Error> {
        let bytes = self.bytes.get(..end).ok_or(Error::Malformed("an array ends too early"))?;
        Ok(Decoder { bytes, at: self.at })
    }

    /// The elements of an array, which start at multiples of `alignment`; the caller reads them until the end.
    pub(crate) fn array(&mut self, alignment: usize) -> Result<Decoder<'a>, Error> {
        let length = self.u32()? as usize;
        self.align(alignment);
        let end = self.at.checked_add(length).ok_or(Error::Malformed("a length"))?;
        let elements = self.until(end)?;
        self.at = end;
        Ok(elements)
    }

    pub(crate) fn variant(&mut self) -> Result<Value, Error> {
        Ok(match self.signature()? {
            "b" => Value::Bool(self.bool()?),
            "u" => Value::U32(self.u32()?),
            "t" => Value::U64(self.u64()?),
            "s" | "o" => Value::Text(self.text()?.to_owned()),
            "g" => Value::Text(self.signature()?.to_owned()),
            "au" => {
                let mut elements = self.array(4)?;
                let mut values = Vec::new();
                while !elements.is_at_end() {
                    values.push(elements.u32()?);
                }
                Value::Numbers(values)
            }
            "ay" => {
                let elements = self.array(1)?;
                Value::Bytes(elements.bytes.get(elements.at..).unwrap_or_default().to_vec())
            }
            _ => return Err(Error::Malformed("a value of a type that nobody asked for")),
        })
    }
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Call = 1,
    Return = 2,
    Error = 3,
    Signal = 4,
}

/// A message; texts that it does not have are empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) kind: Kind,
    pub(crate) serial: u32,
    pub(crate) reply_to: u32,
    pub(crate) destination: String,
    pub(crate) path: String,
    pub(crate) interface: String,
    pub(crate) member: String,
    pub(crate) error_name: String,
    pub(crate) signature: String,
    pub(crate) body: Vec<u8>,
}

impl Message {
    pub(crate) fn new(kind: Kind) -> Message {
        let none = String::new;
        Message {
            kind,
            serial: 0,
            reply_to: 0,
            destination: none(),
            path: none(),
            interface: none(),
            member: none(),
            error_name: none(),
            signature: none(),
            body: Vec::new(),
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::default();
        for byte in [LITTLE_ENDIAN, self.kind as u8, 0, PROTOCOL] {
            out.byte(byte);
        }
        out.u32(self.body.len() as u32);
        out.u32(self.serial);
        out.array(8, |fields| {
            let texts = [
                (1, "o", &self.path),
                (2, "s", &self.interface),
                (3, "s", &self.member),
                (4, "s", &self.error_name),
                (6, "s", &self.destination),
                (8, "g", &self.signature),
            ];
            for (code, signature, text) in texts.into_iter().filter(|(_, _, text)| !text.is_empty()) {
                fields.header_field(code, signature, text);
            }
            if self.reply_to != 0 {
                fields.structure();
                fields.byte(5);
                fields.variant(&Value::U32(self.reply_to));
            }
        });
        out.align(8);
        out.bytes.extend(&self.body);
        out.finish()
    }

    /// How long a message is in all that begins like this.
    pub(crate) fn length(fixed: &[u8; FIXED_BYTES]) -> Result<usize, Error> {
        if fixed[0] != LITTLE_ENDIAN || fixed[3] != PROTOCOL {
            return Err(Error::Malformed("another byte order or protocol"));
        }
        let mut decoder = Decoder { bytes: fixed, at: 4 };
        let body = decoder.u32()? as usize;
        let _serial = decoder.u32()?;
        let fields = decoder.u32()? as usize;
        if body > MESSAGE_BYTES_MAX || fields > MESSAGE_BYTES_MAX {
            return Err(Error::Malformed("it is too long"));
        }
        Ok((FIXED_BYTES + fields).next_multiple_of(8) + body)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Message, Error> {
        let mut decoder = Decoder::new(bytes);
        let start = decoder.take(4)?;
        let kind = match start[1] {
            1 => Kind::Call,
            2 => Kind::Return,
            3 => Kind::Error,
            4 => Kind::Signal,
            _ => return Err(Error::Malformed("it is of no known kind")),
        };
        let mut message = Message::new(kind);
        let length = decoder.u32()? as usize;
        message.serial = decoder.u32()?;
        let mut fields = decoder.array(8)?;
        while !fields.is_at_end() {
            fields.align(8);
            let code = fields.byte()?;
            let value = fields.variant()?;
            let place = match (code, &value) {
                (1, _) => &mut message.path,
                (2, _) => &mut message.interface,
                (3, _) => &mut message.member,
                (4, _) => &mut message.error_name,
                (6, _) => &mut message.destination,
                (8, _) => &mut message.signature,
                (5, Value::U32(serial)) => {
                    message.reply_to = *serial;
                    continue;
                }
                _ => continue,
            };
            if let Value::Text(text) = value {
                *place = text;
            }
        }
        decoder.align(8);
        message.body = decoder.take(length)?.to_vec();
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_went() {
        let mut body = Encoder::default();
        body.text("a.slice");
        body.array(8, |array| {
            for (name, value) in [
                ("Delegate", Value::Bool(true)),
                ("PIDs", Value::Numbers(vec![1, 70_000])),
                ("AllowedCPUs", Value::Bytes(vec![5])),
                ("MemoryMax", Value::U64(u64::MAX)),
            ] {
                array.structure();
                array.text(name);
                array.variant(&value);
            }
        });
        let mut message = Message::new(Kind::Call);
        message.serial = 7;
        message.path = "/org/freedesktop/systemd1".into();
        message.member = "StartTransientUnit".into();
        message.signature = "sa(sv)".into();
        message.body = body.finish();
        let bytes = message.encode();
        let fixed: [u8; FIXED_BYTES] = bytes[..FIXED_BYTES].try_into().unwrap();
        assert_eq!(Message::length(&fixed).unwrap(), bytes.len());
        let again = Message::decode(&bytes).unwrap();
        assert_eq!(again, message);
        let mut decoder = Decoder::new(&again.body);
        assert_eq!(decoder.text().unwrap(), "a.slice");
        let mut array = decoder.array(8).unwrap();
        let mut names = Vec::new();
        while !array.is_at_end() {
            array.align(8);
            names.push((array.text().unwrap().to_owned(), array.variant().unwrap()));
        }
        assert_eq!(names[1], ("PIDs".to_owned(), Value::Numbers(vec![1, 70_000])));
        assert_eq!(names[3].1, Value::U64(u64::MAX));
        assert_eq!(names.len(), 4);
    }

    #[test]
    fn the_bytes_of_a_call_are_those_of_the_specification() {
        let mut message = Message::new(Kind::Call);
        message.serial = 1;
        message.path = "/a".into();
        message.member = "M".into();
        let expected: &[u8] = b"l\x01\x00\x01\x00\x00\x00\x00\x01\x00\x00\x00\x1a\x00\x00\x00\
            \x01\x01o\x00\x02\x00\x00\x00/a\x00\x00\x00\x00\x00\x00\x03\x01s\x00\x01\x00\x00\x00M\x00\
            \x00\x00\x00\x00\x00\x00";
        assert_eq!(message.encode(), expected);
    }

    #[test]
    fn cut_and_senseless_messages_are_errors() {
        let mut message = Message::new(Kind::Signal);
        message.path = "/p".into();
        message.body = vec![1, 2, 3];
        let bytes = message.encode();
        for end in 0..bytes.len() {
            assert!(Message::decode(&bytes[..end]).is_err(), "{end}");
        }
        let fixed = |at: usize, byte: u8| {
            let mut fixed: [u8; FIXED_BYTES] = bytes[..FIXED_BYTES].try_into().unwrap();
            fixed[at] = byte;
            Message::length(&fixed)
        };
        assert!(fixed(0, b'B').is_err() && fixed(7, 0xff).is_err() && fixed(15, 0xff).is_err());
        let mut decoder = Decoder::new(&[255, 255, 255, 255, 0]);
        assert!(decoder.text().is_err());
    }
}
