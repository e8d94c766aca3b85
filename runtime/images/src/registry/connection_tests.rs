//! What a place is shown and told, against servers on loopback that answer as each test has them.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::Reference;
use crate::registry::endpoints::endpoints;

/// A server, and what it was asked.
struct Server {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// `answer` makes the whole answer of a request, given with its head.
    async fn start(answer: impl Fn(&str) -> String + Send + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") && stream.read_buf(&mut head).await.is_ok_and(|count| count > 0) {}
                let head = String::from_utf8(head).unwrap();
                let answer = answer(&head);
                seen.lock().push(head);
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Server { address, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().clone()
    }
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n{body}", body.len())
}

fn connection(config: &RegistryConfig, registry: &str) -> Connection {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let auth = Auth::Basic { username: "oar".into(), password: "lock".into() };
    let reference = Reference::parse(&format!("{registry}/a/b")).unwrap();
    let endpoint = endpoints(config, &reference, Some(&auth.into())).unwrap().pop().unwrap();
    Connection::new(config, endpoint, "a/b").unwrap()
}

async fn get(registry: &Server) -> Result<Response, Failure> {
    connection(&RegistryConfig::default(), &registry.address).get("a/b/manifests/1", "*/*", None).await
}

fn text(failure: Failure) -> String {
    match failure {
        Failure::NotFound => "not found".to_owned(),
        Failure::Denied(message) | Failure::Other(message) => message,
    }
}

#[tokio::test]
async fn a_challenge_of_somebody_else_is_not_answered() {
    let basic = "www-authenticate: Basic realm=\"x\"\r\n";
    let stranger = Server::start(move |_| answer("401 Unauthorized", basic, "")).await;
    let token = Server::start(|_| answer("200 OK", "", r#"{"token": "t"}"#)).await;
    let realm = format!("www-authenticate: Bearer realm=\"http://{}/token\"\r\n", token.address);
    let with_realm = Server::start(move |_| answer("401 Unauthorized", &realm, "")).await;
    for other in [&stranger, &with_realm] {
        let location = format!("location: http://{}/blob\r\n", other.address);
        let registry = Server::start(move |_| answer("307 Temporary Redirect", &location, "")).await;
        assert!(matches!(get(&registry).await, Err(Failure::Denied(_))));
        assert_eq!((registry.asked().len(), other.asked().len()), (1, 1));
    }
    assert!(token.asked().is_empty(), "{:?}", token.asked());

    // The registry's own is.
    let registry = Server::start(move |head| match head.contains("authorization: Basic b2FyOmxvY2s=") {
        true => answer("200 OK", "", ""),
        false => answer("401 Unauthorized", basic, ""),
    })
    .await;
    assert!(get(&registry).await.is_ok());
}

#[tokio::test]
async fn what_a_registry_says_is_passed_on_cut_and_on_one_line() {
    let long = "x".repeat(100_000);
    let all = std::iter::once("a\u{1b}\nb").chain(std::iter::repeat_n(long.as_str(), 9));
    let errors: Vec<_> = all.map(|message| serde_json::json!({"code": "DENIED", "message": message})).collect();
    let body = serde_json::json!({ "errors": errors }).to_string();
    let registry = Server::start(move |_| answer("500 Internal Server Error", "", &body)).await;
    let told = text(get(&registry).await.unwrap_err());
    assert!(told.contains(" answered 500 Internal Server Error: a  b, xxx") && told.contains("x…, x"), "{told}");
    assert!(told.ends_with(", …") && told.len() < 1200, "{told}");
}

#[tokio::test]
async fn of_a_signed_address_only_the_host_is_told() {
    let signed = |address: &str| format!("location: http://{address}/blob?signature=hidden\r\n");
    let silent = Server::start(|_| String::new()).await;
    let location = signed(&silent.address);
    let registry = Server::start(move |_| answer("307 Temporary Redirect", &location, "")).await;
    let told = text(get(&registry).await.unwrap_err());
    assert!(told.contains(&format!("http://{}: ", silent.address)), "{told}");
    assert!(!told.contains("hidden") && !told.contains("/blob"), "{told}");

    // Nor when it breaks off in the middle.
    let short = Server::start(|_| answer("200 OK", "", "1234").replace("length: 4", "length: 9")).await;
    let location = signed(&short.address);
    let registry = Server::start(move |_| answer("307 Temporary Redirect", &location, "")).await;
    let reference = Reference::parse(&format!("{}/a/b", registry.address)).unwrap();
    let source = crate::registry::sources(&RegistryConfig::default(), &reference, None).unwrap().pop().unwrap();
    let mut stream = source.blob("sha256:0", 9, 0).await.unwrap();
    let told = loop {
        if let Err(error) = futures::StreamExt::next(&mut stream).await.unwrap() {
            break chain(&error);
        }
    };
    assert!(!told.contains("hidden"), "{told}");
}

#[tokio::test]
async fn after_tls_nothing_goes_on_without_it_but_where_it_is_configured() {
    let config = RegistryConfig { plain_http: vec!["plain.example:8080".into()], ..RegistryConfig::default() };
    let connection = connection(&config, "r.example");
    let step = |from: &str, to: &str| connection.check_step(&Url::parse(from).unwrap(), &Url::parse(to).unwrap());
    for to in ["https://cdn.example/b", "http://localhost:5000/b", "http://[::1]/b", "http://plain.example:8080/b"] {
        assert!(step("https://r.example/v2/a", to).is_ok(), "{to}");
    }
    assert!(step("http://r.example/v2/a", "http://cdn.example/b").is_ok());
    let told = text(step("https://r.example/v2/a", "http://cdn.example/b?signature=hidden").unwrap_err());
    assert_eq!(told, "r.example sends us to http://cdn.example, which is not safe from others (no TLS)");
    assert!(step("http://r.example/v2/a", "ftp://cdn.example/b").is_err());

    // The password stays here.
    let auth = Some(Auth::Basic { username: "oar".into(), password: "lock".into() });
    let told = text(connection.token("http://token.example/t?x", None, None, auth.as_ref()).await.unwrap_err());
    assert!(told.contains("http://token.example, which is not safe"), "{told}");
}

#[test]
fn what_is_configured_for_a_place_is_not_for_others() {
    let connection = connection(&RegistryConfig::default(), "r.example");
    let client = |url: &str| std::ptr::from_ref(connection.clients.client(&Url::parse(url).unwrap()).unwrap());
    let own = client("https://r.example/v2/a");
    let other = client("https://cdn.example/a");
    assert_eq!((client("https://r.example:443/b"), client("https://token.example/b")), (own, other));
    assert!(own != other && client("http://r.example/b") == other && client("http://127.0.0.1:1/b") != other);
}
