//! A plugin of the Node Resource Interface as tests need one: it speaks the wire by itself, on a thread of its own, answers
//! as the test says, and tells the test what it was asked.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use oarlock_nri::api;
use prost::Message;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

const LIMIT: Duration = Duration::from_secs(20);

/// What a plugin subscribes to unless it says otherwise.
const ALL_BUT_VALIDATION: i32 = (1 << 13) - 1;

/// How a plugin answers a call.
pub enum Answer {
    Message(Vec<u8>),
    Error(i32, String),
    Silence,
}

impl Answer {
    pub fn nothing() -> Answer {
        Answer::Message(Vec::new())
    }

    pub fn of(message: &impl Message) -> Answer {
        Answer::Message(message.encode_to_vec())
    }

    pub fn refuse(why: &str) -> Answer {
        Answer::Error(2, why.to_owned())
    }
}

/// A call that the plugin got.
#[derive(Debug)]
pub struct Call {
    pub method: String,
    pub payload: Vec<u8>,
}

impl Call {
    pub fn decode<M: Message + Default>(&self) -> M {
        M::decode(self.payload.as_slice()).unwrap()
    }

    /// The name of the container that the call is about, or of the pod.
    pub fn about(&self) -> String {
        let about: api::EventRequest = self.decode();
        match about.container {
            Some(container) => container.name,
            None => about.pod.map(|pod| pod.name).unwrap_or_default(),
        }
    }
}

/// The envelope of a call.
#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
}

/// The envelope of an answer.
#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

/// A plugin that is connected. It goes when it is dropped.
pub struct Plugin {
    socket: UnixStream,
    calls: UnboundedReceiver<Call>,
    answers: UnboundedReceiver<Response>,
    next: u32,
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl Plugin {
    /// Connects and registers. `answer` is asked for every call.
    pub async fn connect(
        socket: &Path,
        index: &str,
        name: &str,
        answer: impl FnMut(&Call) -> Answer + Send + 'static,
    ) -> Plugin {
        Plugin::over(UnixStream::connect(socket).unwrap(), index, name, answer).await
    }

    /// As [`Plugin::connect`], over a connection that is there.
    pub async fn over(
        socket: UnixStream,
        index: &str,
        name: &str,
        answer: impl FnMut(&Call) -> Answer + Send + 'static,
    ) -> Plugin {
        let (calls, got) = unbounded_channel();
        let (answers, heard) = unbounded_channel();
        let reader = socket.try_clone().unwrap();
        std::thread::spawn(move || drop(serve(reader, &calls, &answers, answer)));
        let mut plugin = Plugin { socket, calls: got, answers: heard, next: 1 };
        let request = api::RegisterPluginRequest {
            plugin_name: name.to_owned(),
            plugin_idx: index.to_owned(),
            nri_version: "v0.9.0".to_owned(),
        };
        plugin.ask("RegisterPlugin", &request).await.unwrap();
        plugin
    }

    /// The next call; fails if none comes.
    pub async fn next(&mut self) -> Call {
        tokio::time::timeout(LIMIT, self.calls.recv()).await.expect("a call comes").expect("the plugin is connected")
    }

    /// The next call of this name, with those before it left out.
    pub async fn call(&mut self, method: &str) -> Call {
        loop {
            let call = self.next().await;
            if call.method == method {
                return call;
            }
        }
    }

    /// Resolves once the runtime has closed the connection.
    pub async fn closed(&mut self) {
        let drained = async { while self.calls.recv().await.is_some() {} };
        tokio::time::timeout(LIMIT, drained).await.expect("the runtime closes the connection");
    }

    /// Calls the runtime.
    pub async fn ask(&mut self, method: &str, request: &impl Message) -> Result<Vec<u8>, String> {
        let envelope = Request {
            service: "nri.pkg.api.v1alpha1.Runtime".to_owned(),
            method: method.to_owned(),
            payload: request.encode_to_vec(),
        };
        write(&mut self.socket, 2, self.next, 1, &envelope.encode_to_vec()).unwrap();
        self.next += 2;
        let answer = tokio::time::timeout(LIMIT, self.answers.recv()).await.expect("an answer comes");
        let answer = answer.expect("the plugin is connected");
        match answer.status {
            Some(status) if status.code != 0 => Err(status.message),
            _ => Ok(answer.payload),
        }
    }
}

fn serve(
    mut socket: UnixStream,
    calls: &UnboundedSender<Call>,
    answers: &UnboundedSender<Response>,
    mut answer: impl FnMut(&Call) -> Answer,
) -> io::Result<()> {
    let mut streams = [Vec::new(), Vec::new()];
    loop {
        let mut header = [0; 8];
        socket.read_exact(&mut header)?;
        let connection = u32::from_be_bytes(header[..4].try_into().unwrap()) as usize;
        let length = u32::from_be_bytes(header[4..].try_into().unwrap()) as usize;
        // The readers of plugins take a first piece of at most this.
        let stream = &mut streams[connection - 1];
        assert!(length <= 4096 || !stream.is_empty(), "a first piece of {length} bytes");
        let mut piece = vec![0; length];
        socket.read_exact(&mut piece)?;
        stream.extend(piece);
        while let Some((number, data)) = take(stream) {
            if connection == 2 {
                let _ = answers.send(Response::decode(data.as_slice()).unwrap());
                continue;
            }
            let request = Request::decode(data.as_slice()).unwrap();
            assert_eq!(request.service, "nri.pkg.api.v1alpha1.Plugin");
            let call = Call { method: request.method, payload: request.payload };
            let said = match answer(&call) {
                Answer::Message(nothing) if call.method == "Configure" && nothing.is_empty() => {
                    Answer::of(&api::ConfigureResponse { events: ALL_BUT_VALIDATION })
                }
                said => said,
            };
            let response = match said {
                Answer::Message(payload) => Response { status: None, payload },
                Answer::Error(code, message) => {
                    Response { status: Some(Status { code, message }), payload: Vec::new() }
                }
                Answer::Silence => {
                    let _ = calls.send(call);
                    continue;
                }
            };
            // Told before it is answered: what follows the answer comes after it.
            let _ = calls.send(call);
            write(&mut socket, 1, number, 2, &response.encode_to_vec())?;
        }
    }
}

fn take(stream: &mut Vec<u8>) -> Option<(u32, Vec<u8>)> {
    let header = stream.first_chunk::<10>()?;
    let length = u32::from_be_bytes(header[..4].try_into().unwrap()) as usize;
    let number = u32::from_be_bytes(header[4..8].try_into().unwrap());
    if stream.len() < 10 + length {
        return None;
    }
    let rest = stream.split_off(10 + length);
    let data = std::mem::replace(stream, rest).split_off(10);
    Some((number, data))
}

fn write(socket: &mut UnixStream, connection: u32, number: u32, kind: u8, data: &[u8]) -> io::Result<()> {
    let mut message = Vec::new();
    message.extend((data.len() as u32).to_be_bytes());
    message.extend(number.to_be_bytes());
    message.extend([kind, 0]);
    message.extend(data);
    let mut piece = Vec::new();
    piece.extend(connection.to_be_bytes());
    piece.extend((message.len() as u32).to_be_bytes());
    piece.extend(message);
    socket.write_all(&piece)
}
