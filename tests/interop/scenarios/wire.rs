//! HTTP/1 as it is on the wire, for servers that break its rules and for clients that look closely.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The most bytes of a line; who sends longer ones has lost its way.
const LINE: usize = 1 << 20;

/// Names and values in their order, names in lower case.
pub(crate) type Fields = Vec<(String, String)>;

/// A connection, and what has come of it and was not looked at yet.
pub(crate) struct Wire {
    stream: TcpStream,
    ahead: Vec<u8>,
    /// Its other end broke it off.
    pub(crate) broken: bool,
}

/// A body, as far as it came.
#[derive(Debug, Default)]
pub(crate) struct Body {
    pub(crate) bytes: Vec<u8>,
    pub(crate) trailers: Fields,
    pub(crate) whole: bool,
}

/// The value of the first field of this name.
pub(crate) fn field<'a>(fields: &'a Fields, name: &str) -> Option<&'a str> {
    fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

impl Wire {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, ahead: Vec::new(), broken: false }
    }

    /// Reads more; `false` at the end.
    async fn more(&mut self) -> bool {
        let mut buffer = vec![0; 16 << 10];
        match self.stream.read(&mut buffer).await {
            Ok(0) => false,
            Ok(length) => {
                self.ahead.extend_from_slice(&buffer[..length]);
                true
            }
            Err(_) => {
                self.broken = true;
                false
            }
        }
    }

    /// Whether everything could be written.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).await.is_ok()
    }

    /// Ends its own side.
    pub(crate) async fn end(&mut self) {
        // who has gone is told by reading
        self.stream.shutdown().await.unwrap_or_default();
    }

    /// The next line without its end.
    pub(crate) async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.ahead.windows(2).position(|w| w == b"\r\n") {
                let line: Vec<u8> = self.ahead.drain(..end + 2).take(end).collect();
                return Some(String::from_utf8_lossy(&line).into_owned());
            }
            if self.ahead.len() > LINE || !self.more().await {
                return None;
            }
        }
    }

    /// Fields up to the empty line.
    pub(crate) async fn fields(&mut self) -> Option<Fields> {
        let mut fields = Vec::new();
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Some(fields);
            }
            let (name, value) = line.split_once(':')?;
            fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    /// As many bytes, or fewer at the end.
    pub(crate) async fn exact(&mut self, length: usize) -> Vec<u8> {
        while self.ahead.len() < length && self.more().await {}
        self.ahead.drain(..length.min(self.ahead.len())).collect()
    }

    /// What there is, once there is something; empty at the end.
    pub(crate) async fn some(&mut self) -> Vec<u8> {
        if self.ahead.is_empty() {
            self.more().await;
        }
        std::mem::take(&mut self.ahead)
    }

    /// All up to the end.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        while self.more().await {}
        std::mem::take(&mut self.ahead)
    }

    /// A body in chunks.
    async fn chunks(&mut self) -> Body {
        let mut body = Body::default();
        loop {
            let Some(line) = self.line().await else { return body };
            let size = line.split(';').next().unwrap_or_default();
            let Ok(size) = usize::from_str_radix(size.trim(), 16) else { return body };
            if size == 0 {
                let trailers = self.fields().await;
                body.whole = trailers.is_some();
                body.trailers = trailers.unwrap_or_default();
                return body;
            }
            let chunk = self.exact(size).await;
            let short = chunk.len() < size;
            body.bytes.extend(chunk);
            if short || self.line().await.is_none() {
                return body;
            }
        }
    }

    /// A body that is framed by these fields; `rest`: it may end with the connection.
    pub(crate) async fn body(&mut self, fields: &Fields, rest: bool) -> Body {
        if field(fields, "transfer-encoding").is_some() {
            return self.chunks().await;
        }
        if let Some(length) = field(fields, "content-length") {
            let length = length.parse().unwrap_or_default();
            let bytes = self.exact(length).await;
            return Body { whole: bytes.len() == length, bytes, trailers: Fields::new() };
        }
        let bytes = if rest { self.rest().await } else { Vec::new() };
        Body { bytes, trailers: Fields::new(), whole: !self.broken }
    }
}
