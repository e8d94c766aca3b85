//! The whole server over loopback, with a SPDY client made of the session's client side and a WebSocket client.

use async_trait::async_trait;
use futures::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Empty};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role as SocketRole;

use super::*;
use crate::backend::{Io, TerminalSize};
use crate::spdy::{Headers, Role, Session, Stream};
use crate::websocket::MessageBytes;

/// Commands: `echo` copies stdin to stdout, `exit N`, `flood N` writes N bytes, `sizes` prints sizes, `hang`, `fail`,
/// `deaf` never reads its stdin. Ports: 80 echoes, 81 refuses, 82 never reads.
struct Fake {
    /// Told when a hanging command starts and when its future is dropped.
    dropped: mpsc::UnboundedSender<()>,
}

struct TellsDrop(mpsc::UnboundedSender<()>);

impl TellsDrop {
    fn new(sender: &mpsc::UnboundedSender<()>) -> Self {
        let _ = sender.send(());
        Self(sender.clone())
    }
}

impl Drop for TellsDrop {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

#[async_trait]
impl Backend for Fake {
    async fn exec(&self, params: ExecParams, mut io: Io) -> Result<i32, StreamError> {
        let argument = params.command.get(1).and_then(|text| text.parse().ok()).unwrap_or(0);
        match params.command[0].as_str() {
            "echo" => {
                let (mut stdin, mut stdout) = (io.stdin.take().unwrap(), io.stdout.take().unwrap());
                tokio::io::copy(&mut stdin, &mut stdout).await.map_err(|e| StreamError::failed(e.to_string()))?;
                if let Some(stderr) = &mut io.stderr {
                    let _ = stderr.write_all(b"done").await;
                }
                Ok(0)
            }
            "exit" => Ok(argument),
            "flood" => {
                let mut stdout = io.stdout.take().unwrap();
                let block = vec![b'x'; 100_000];
                let mut left = argument as usize;
                while left > 0 {
                    let length = left.min(block.len());
                    stdout.write_all(&block[..length]).await.map_err(|e| StreamError::failed(e.to_string()))?;
                    left -= length;
                }
                Ok(0)
            }
            "sizes" => {
                let mut stdout = io.stdout.take().unwrap();
                for _ in 0..2 {
                    let size = io.resize.recv().await.unwrap_or(TerminalSize { width: 0, height: 0 });
                    let _ = stdout.write_all(format!("{}x{} ", size.width, size.height).as_bytes()).await;
                }
                Ok(0)
            }
            "fail" => Err(StreamError::NotFound { what: "container \"c\"".into() }),
            _ => {
                let _tells = TellsDrop::new(&self.dropped);
                std::future::pending::<()>().await;
                Ok(0)
            }
        }
    }

    async fn attach(&self, params: AttachParams, mut io: Io) -> Result<(), StreamError> {
        let _ = io.stdout.take().unwrap().write_all(params.container_id.as_bytes()).await;
        Ok(())
    }

    async fn port_forward(&self, _sandbox: &str, port: u16, mut stream: DuplexStream) -> Result<(), StreamError> {
        match port {
            80 => {
                let (mut read, mut write) = tokio::io::split(&mut stream);
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
                Ok(())
            }
            81 => Err(StreamError::failed("connection refused")),
            _ => {
                let _tells = TellsDrop::new(&self.dropped);
                std::future::pending().await
            }
        }
    }
}

struct Bench {
    server: Arc<StreamingServer>,
    shutdown: CancellationToken,
    dropped: mpsc::UnboundedReceiver<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

async fn bench() -> Bench {
    let (sender, dropped) = mpsc::unbounded_channel();
    let server = StreamingServer::bind("127.0.0.1:0".parse().unwrap(), Arc::new(Fake { dropped: sender })).await;
    let server = Arc::new(server.unwrap());
    let shutdown = CancellationToken::new();
    tokio::spawn(server.clone().run(shutdown.clone()));
    Bench { server, shutdown, dropped }
}

fn exec(command: &str, stdin: bool, tty: bool) -> ExecParams {
    ExecParams {
        container_id: "c".into(),
        command: command.split(' ').map(str::to_string).collect(),
        tty,
        stdin,
        stdout: true,
        stderr: !tty,
    }
}

/// Sends an upgrade request; gives the answer and, after a 101, the connection.
async fn upgrade(url: &str, headers: &[(&str, &str)]) -> (http::response::Parts, String, Option<TokioIo<Upgraded>>) {
    let uri: http::Uri = url.parse().unwrap();
    let stream = TcpStream::connect(uri.authority().unwrap().as_str()).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    let mut request = Request::post(uri.path()).header("host", "x");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
    let (parts, body) = response.into_parts();
    if parts.status != StatusCode::SWITCHING_PROTOCOLS {
        let body = body.collect().await.unwrap().to_bytes();
        return (parts, String::from_utf8(body.to_vec()).unwrap(), None);
    }
    let upgraded = hyper::upgrade::on(Response::from_parts(parts.clone(), body)).await.unwrap();
    (parts, String::new(), Some(TokioIo::new(upgraded)))
}

async fn spdy(url: &str, versions: &[&str]) -> Session {
    let mut headers = vec![("connection", "Upgrade"), ("upgrade", "SPDY/3.1")];
    headers.extend(versions.iter().map(|version| ("x-stream-protocol-version", *version)));
    let (parts, _, io) = upgrade(url, &headers).await;
    let agreed = parts.headers.get("x-stream-protocol-version").map(|value| value.to_str().unwrap());
    assert_eq!(agreed, versions.first().copied());
    Session::start(io.expect("an upgrade"), Role::Client)
}

async fn socket(url: &str, protocol: &str) -> WebSocketStream<TokioIo<Upgraded>> {
    let headers = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", protocol),
    ];
    let (parts, _, io) = upgrade(url, &headers).await;
    assert_eq!(parts.headers["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    assert_eq!(parts.headers["sec-websocket-protocol"], protocol);
    WebSocketStream::from_raw_socket(io.expect("an upgrade"), SocketRole::Client, None).await
}

struct Client {
    session: Session,
    error: Stream,
    stdin: Option<Stream>,
    stdout: Stream,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

/// Opens the streams as kubectl does.
async fn client(url: &str, versions: &[&str], params: &ExecParams) -> Client {
    let mut session = spdy(url, versions).await;
    let error = open(&mut session, "error").await;
    let mut maybe = Vec::new();
    for (wanted, kind) in [(params.stdin, "stdin"), (params.stderr, "stderr"), (params.tty, "resize")] {
        maybe.push(if wanted { Some(open(&mut session, kind).await) } else { None });
    }
    let stdout = open(&mut session, "stdout").await;
    let (resize, stderr, stdin) = (maybe.pop().flatten(), maybe.pop().flatten(), maybe.pop().flatten());
    Client { session, error, stdin, stdout, stderr, resize }
}

async fn open(session: &mut Session, kind: &str) -> Stream {
    session.open(Headers::of(&[("streamType", kind)])).await.unwrap()
}

async fn text(stream: &mut Stream) -> String {
    let mut text = String::new();
    timeout(Duration::from_secs(60), stream.reader.read_to_string(&mut text)).await.expect("an end").unwrap();
    text
}

#[tokio::test]
async fn spdy_exec_copies_streams_and_tells_success() {
    let bench = bench().await;
    let params = exec("echo", true, false);
    let mut client = client(&bench.server.exec_url(params.clone()).unwrap(), &["v4.channel.k8s.io"], &params).await;
    let stdin = client.stdin.as_mut().unwrap();
    stdin.writer.write_all(b"hello").await.unwrap();
    stdin.writer.shutdown().await.unwrap();
    assert_eq!(text(&mut client.stdout).await, "hello");
    assert_eq!(text(client.stderr.as_mut().unwrap()).await, "done");
    let status: Value = serde_json::from_str(&text(&mut client.error).await).unwrap();
    assert_eq!(status["status"], "Success");
    timeout(Duration::from_secs(5), client.session.pulse().closed()).await.expect("the session ends");
}

#[tokio::test]
async fn exit_codes_are_told_by_every_version() {
    let bench = bench().await;
    let params = exec("exit 42", false, false);
    for version in ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"] {
        let mut client = client(&bench.server.exec_url(params.clone()).unwrap(), &[version], &params).await;
        let told = text(&mut client.error).await;
        if version.starts_with("v4") {
            let status: Value = serde_json::from_str(&told).unwrap();
            assert_eq!(status["details"]["causes"][0]["message"], "42");
        } else {
            assert_eq!(told, "command terminated with non-zero exit code: exit status 42", "{version}");
        }
    }
}

#[tokio::test]
async fn failures_carry_their_reason() {
    let bench = bench().await;
    let params = exec("fail", false, false);
    let mut client = client(&bench.server.exec_url(params.clone()).unwrap(), &["v4.channel.k8s.io"], &params).await;
    let status: Value = serde_json::from_str(&text(&mut client.error).await).unwrap();
    assert!(status["message"].as_str().unwrap().contains("container \"c\" not found"), "{status}");
}

#[tokio::test]
async fn a_lot_of_data_arrives_whole() {
    let bench = bench().await;
    let params = exec("flood 20000000", false, false);
    let mut client = client(&bench.server.exec_url(params.clone()).unwrap(), &["v4.channel.k8s.io"], &params).await;
    assert_eq!(text(&mut client.stdout).await.len(), 20_000_000);
}

#[tokio::test]
async fn terminal_sizes_reach_the_backend() {
    let bench = bench().await;
    let params = exec("sizes", false, true);
    let mut client = client(&bench.server.exec_url(params.clone()).unwrap(), &["v4.channel.k8s.io"], &params).await;
    let resize = client.resize.as_mut().unwrap();
    resize.writer.write_all(b"{\"Width\":80,\"Height\":24}\n{\"Width\":100,\"Height\":50}\n").await.unwrap();
    assert_eq!(text(&mut client.stdout).await, "80x24 100x50 ");
}

#[tokio::test]
async fn a_client_that_goes_away_ends_the_command() {
    let mut bench = bench().await;
    let params = exec("hang", true, false);
    let client = client(&bench.server.exec_url(params.clone()).unwrap(), &["v4.channel.k8s.io"], &params).await;
    bench.dropped.recv().await;
    drop(client);
    timeout(Duration::from_secs(10), bench.dropped.recv()).await.expect("the command is dropped");
}

#[tokio::test]
async fn attach_is_served_too() {
    let bench = bench().await;
    let params = exec("x", false, false);
    let attach = AttachParams { container_id: "c-9".into(), tty: false, stdin: false, stdout: true, stderr: true };
    let mut client = client(&bench.server.attach_url(attach).unwrap(), &["v4.channel.k8s.io"], &params).await;
    assert_eq!(text(&mut client.stdout).await, "c-9");
}

#[tokio::test]
async fn urls_are_good_once_and_only_for_what_they_name() {
    let bench = bench().await;
    let url = bench.server.exec_url(exec("exit 0", false, false)).unwrap();
    let wrong = url.replace("/exec/", "/attach/");
    assert_eq!(upgrade(&wrong, &[]).await.0.status, StatusCode::NOT_FOUND);
    let url = bench.server.exec_url(exec("exit 0", false, false)).unwrap();
    assert_eq!(upgrade(&url, &[]).await.0.status, StatusCode::BAD_REQUEST);
    assert_eq!(upgrade(&url, &[]).await.0.status, StatusCode::NOT_FOUND);
    let url = bench.server.exec_url(exec("exit 0", false, false)).unwrap();
    let headers =
        [("connection", "upgrade"), ("upgrade", "spdy/3.1"), ("x-stream-protocol-version", "v9.channel.k8s.io")];
    let (parts, body, _) = upgrade(&url, &headers).await;
    assert_eq!(parts.status, StatusCode::FORBIDDEN, "{body}");
    assert_eq!(parts.headers.get_all("x-accepted-stream-protocol-versions").iter().count(), 4);
}

#[tokio::test]
async fn impossible_streams_are_refused() {
    let bench = bench().await;
    let mut params = exec("x", false, true);
    params.stderr = true;
    assert!(matches!(bench.server.exec_url(params), Err(StreamError::Invalid { .. })));
    let attach = AttachParams { container_id: "c".into(), tty: false, stdin: false, stdout: false, stderr: false };
    assert!(bench.server.attach_url(attach).is_err());
}

/// Reads messages to the close frame; gives each channel's bytes.
async fn channels(socket: &mut WebSocketStream<TokioIo<Upgraded>>) -> [Vec<u8>; 5] {
    let mut channels: [Vec<u8>; 5] = Default::default();
    loop {
        match timeout(Duration::from_secs(10), socket.next()).await.expect("a message") {
            Some(Ok(Message::Binary(data))) => channels[usize::from(data[0])].extend_from_slice(&data[1..]),
            Some(Ok(Message::Close(_))) | None => return channels,
            Some(Ok(_)) => {}
            Some(Err(error)) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn websocket_v5_closes_stdin_by_itself() {
    let bench = bench().await;
    let mut socket = socket(&bench.server.exec_url(exec("echo", true, false)).unwrap(), "v5.channel.k8s.io").await;
    socket.send(Message::Binary(Bytes::from_static(b"\0hello"))).await.unwrap();
    socket.send(Message::Binary(Bytes::from_static(b"\xff\0"))).await.unwrap();
    let [_, stdout, stderr, error, _] = channels(&mut socket).await;
    assert_eq!((stdout.as_slice(), stderr.as_slice()), (&b"hello"[..], &b"done"[..]));
    let status: Value = serde_json::from_slice(&error).unwrap();
    assert_eq!(status["status"], "Success");
}

#[tokio::test]
async fn websocket_v4_tells_exit_codes_and_takes_sizes() {
    let bench = bench().await;
    let mut first = socket(&bench.server.exec_url(exec("exit 7", false, false)).unwrap(), "v4.channel.k8s.io").await;
    let status: Value = serde_json::from_slice(&channels(&mut first).await[3]).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "7");
    let mut second = socket(&bench.server.exec_url(exec("sizes", false, true)).unwrap(), "v4.channel.k8s.io").await;
    for size in ["\x04{\"Width\":80,\"Height\":24}", "\x04{\"Width\":9,\"Height\":8}"] {
        second.send(Message::Binary(Bytes::from_static(size.as_bytes()))).await.unwrap();
    }
    assert_eq!(channels(&mut second).await[1], b"80x24 9x8 ");
}

#[tokio::test]
async fn websocket_base64_is_text() {
    let bench = bench().await;
    let url = bench.server.exec_url(exec("flood 2", false, false)).unwrap();
    let mut socket = socket(&url, "base64.channel.k8s.io").await;
    let mut texts = Vec::new();
    while let Some(Ok(message)) = socket.next().await {
        if let Message::Text(text) = message {
            texts.push(text.to_string());
        }
    }
    assert_eq!(texts, ["1", "1eHg="]);
}

#[tokio::test]
async fn a_websocket_that_goes_away_ends_the_command() {
    let mut bench = bench().await;
    let socket = socket(&bench.server.exec_url(exec("hang", true, false)).unwrap(), "v5.channel.k8s.io").await;
    bench.dropped.recv().await;
    drop(socket);
    timeout(Duration::from_secs(10), bench.dropped.recv()).await.expect("the command is dropped");
}

/// Opens one forwarded connection.
async fn connect(session: &mut Session, port: &str, id: &str) -> (Stream, Stream) {
    let headers = |kind| Headers::of(&[("streamType", kind), ("port", port), ("requestID", id)]);
    let mut error = session.open(headers("error")).await.unwrap();
    error.writer.shutdown().await.unwrap();
    let data = session.open(headers("data")).await.unwrap();
    (data, error)
}

async fn echo(data: &mut Stream, what: &str) {
    data.writer.write_all(what.as_bytes()).await.unwrap();
    data.writer.shutdown().await.unwrap();
    assert_eq!(text(data).await, what);
}

#[tokio::test]
async fn port_forward_pairs_streams_and_half_closes() {
    let bench = bench().await;
    let url = bench.server.port_forward_url("s", vec![]).unwrap();
    let mut session = spdy(&url, &["portforward.k8s.io"]).await;
    for number in 0..20 {
        let (mut data, mut error) = connect(&mut session, "80", &number.to_string()).await;
        echo(&mut data, &format!("hello {number}")).await;
        assert_eq!(text(&mut error).await, "");
    }
}

#[tokio::test]
async fn one_failing_connection_does_not_end_the_session() {
    let bench = bench().await;
    let url = bench.server.port_forward_url("s", vec![]).unwrap();
    let mut session = spdy(&url, &["portforward.k8s.io"]).await;
    let (_stuck, _stuck_error) = connect(&mut session, "82", "stuck").await;
    for port in ["81", "0", "nonsense", "99999"] {
        let (mut data, mut error) = connect(&mut session, port, port).await;
        assert!(!text(&mut error).await.is_empty());
        assert_eq!(text(&mut data).await, "");
    }
    let unpaired = session.open(Headers::of(&[("streamType", "rubbish")])).await.unwrap();
    drop(unpaired);
    let (mut data, _error) = connect(&mut session, "80", "good").await;
    echo(&mut data, "still here").await;
}

#[tokio::test]
async fn port_forward_ends_with_its_client() {
    let mut bench = bench().await;
    let url = bench.server.port_forward_url("s", vec![]).unwrap();
    let mut session = spdy(&url, &["portforward.k8s.io"]).await;
    let _streams = connect(&mut session, "82", "1").await;
    let (mut data, _error) = connect(&mut session, "80", "2").await;
    echo(&mut data, "x").await;
    bench.dropped.recv().await;
    drop((session, _streams, data, _error));
    timeout(Duration::from_secs(10), bench.dropped.recv()).await.expect("the forward is dropped");
}

#[tokio::test]
async fn only_the_ports_of_the_url_are_forwarded() {
    let bench = bench().await;
    let url = bench.server.port_forward_url("s", vec![8080]).unwrap();
    let mut session = spdy(&url, &["portforward.k8s.io"]).await;
    let (_data, mut error) = connect(&mut session, "80", "1").await;
    assert!(text(&mut error).await.contains("invalid port"));
}

#[tokio::test]
async fn port_forward_is_tunnelled_through_websocket() {
    let bench = bench().await;
    let url = bench.server.port_forward_url("s", vec![]).unwrap();
    let socket = socket(&url, "SPDY/3.1+portforward.k8s.io").await;
    let mut session = Session::start(MessageBytes::new(socket), Role::Client);
    let (mut data, _error) = connect(&mut session, "80", "1").await;
    let much = "abcdefgh".repeat(50_000);
    let Stream { reader, writer, .. } = &mut data;
    let mut back = String::new();
    let (sent, received) = tokio::join!(
        async {
            writer.write_all(much.as_bytes()).await?;
            writer.shutdown().await
        },
        reader.read_to_string(&mut back)
    );
    sent.unwrap();
    received.unwrap();
    assert!(back == much);
}

#[tokio::test]
async fn hostile_bytes_end_only_their_session() {
    let bench = bench().await;
    let rubbish: [&[u8]; 4] = [
        &[0xff; 64],
        b"GET / HTTP/1.1\r\n\r\n",
        &[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff],
        &[0x80, 3, 0, 1, 0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2],
    ];
    for bytes in rubbish {
        let url = bench.server.exec_url(exec("hang", true, false)).unwrap();
        let headers = [("connection", "Upgrade"), ("upgrade", "SPDY/3.1")];
        let mut io = upgrade(&url, &headers).await.2.unwrap();
        io.write_all(bytes).await.unwrap();
        let _ = io.shutdown().await;
        let mut rest = Vec::new();
        let ended = timeout(Duration::from_secs(10), io.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the session ends for {bytes:?}");
    }
    let params = exec("exit 0", false, false);
    let mut client = client(&bench.server.exec_url(params.clone()).unwrap(), &["v4.channel.k8s.io"], &params).await;
    assert!(text(&mut client.error).await.contains("Success"));
}

#[tokio::test]
async fn a_command_that_never_reads_holds_its_client_back() {
    let bench = bench().await;
    let params = exec("deaf", true, false);
    let mut client = client(&bench.server.exec_url(params.clone()).unwrap(), &["v4.channel.k8s.io"], &params).await;
    let stdin = client.stdin.as_mut().unwrap();
    let block = vec![0; 1 << 20];
    let flood = async {
        for _ in 0..256 {
            stdin.writer.write_all(&block).await.unwrap();
        }
    };
    assert!(timeout(Duration::from_secs(2), flood).await.is_err(), "256 MiB do not fit into bounded buffers");
}

#[tokio::test]
async fn shutdown_ends_what_runs() {
    let mut bench = bench().await;
    let params = exec("hang", true, false);
    let _client = client(&bench.server.exec_url(params.clone()).unwrap(), &["v4.channel.k8s.io"], &params).await;
    bench.dropped.recv().await;
    bench.shutdown.cancel();
    timeout(Duration::from_secs(10), bench.dropped.recv()).await.expect("the command is dropped");
}
