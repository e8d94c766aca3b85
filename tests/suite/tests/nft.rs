//! nf_tables transactions with the real kernel.

use std::process::Command as Process;
use std::time::{Duration, Instant};

use oarlock_nft::{
    Bytes, Chain, ChainKind, Command, Element, Expr, Family, Field, HookPoint, Kernel, Key, Netlink, Reg, Rule, Set,
    Table, Transaction, Value, Verdict,
};
use oarlock_testkit::in_fresh_namespaces;

fn table() -> Table {
    Table::new(Family::Ip, "test")
}

fn key(number: u32) -> Bytes {
    Key::new().address(std::net::Ipv4Addr::from(0x0a2b_0000 + number).into()).protocol(6).port(80).bytes()
}

fn foundation() -> Transaction {
    let fields = [Field::Ipv4, Field::Protocol, Field::Port];
    let mut transaction = Transaction::new(table());
    transaction.push(Command::AddTable { comment: "a test's".into(), exclusive: true });
    transaction.push(Command::AddSet(Set::verdict_map("verdicts", &fields)));
    transaction.push(Command::AddSet(Set::map("targets", &fields, &[Field::Ipv4, Field::Port])));
    transaction.push(Command::AddSet(Set::new("seen", &[Field::Ipv4]).dynamic(1024, Duration::from_secs(60))));
    transaction.push(Command::AddChain(Chain::base("input", ChainKind::Filter, HookPoint::Input, 0)));
    transaction.push(Command::AddChain(Chain::regular("there")));
    let rule =
        Rule::new("input", vec![Expr::LoadBytes { value: vec![0; 4], to: Reg(0) }, Expr::Counter]).comment("hello");
    transaction.push(Command::AddRule(rule));
    transaction
}

fn add(set: &str, elements: Vec<Element>, exclusive: bool) -> Transaction {
    let mut transaction = Transaction::new(table());
    transaction.push(Command::AddElements { set: set.into(), elements, exclusive });
    transaction
}

fn nft(arguments: &[&str]) -> String {
    let output = Process::new("nft").args(arguments).output().expect("nft runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn what_is_written_is_read_back_and_listed_by_nft() {
    in_fresh_namespaces(|| {
        let mut kernel = Netlink::open().unwrap();
        assert_eq!(kernel.table_comment(&table()).unwrap(), None);
        assert_eq!(kernel.elements(&table(), "verdicts").unwrap(), None);
        kernel.commit(&foundation()).unwrap();
        let verdict = Element::verdict(key(1), Verdict::Goto("there".into())).comment("whose");
        let target = Element::data(key(1), Key::new().address([10, 0, 0, 1].into()).port(8080).bytes());
        kernel.commit(&add("verdicts", vec![verdict.clone()], true)).unwrap();
        kernel.commit(&add("targets", vec![target.clone()], true)).unwrap();
        assert_eq!(kernel.elements(&table(), "verdicts").unwrap(), Some(vec![verdict]));
        assert_eq!(kernel.elements(&table(), "targets").unwrap(), Some(vec![target]));
        assert_eq!(kernel.table_comment(&table()).unwrap().as_deref(), Some("a test's"));
        assert_eq!(kernel.rule_count(&table()).unwrap(), 1);
        let mut chains = kernel.chains(&table()).unwrap();
        chains.sort();
        assert_eq!(chains, ["input", "there"]);
        let text = nft(&["list", "ruleset"]);
        assert!(text.contains("10.43.0.1 . tcp . 80 comment \"whose\" : goto there"), "{text}");
        assert!(text.contains("10.43.0.1 . tcp . 80 : 10.0.0.1 . 8080"), "{text}");
    });
}

#[test]
fn a_transaction_happens_wholly_or_not_at_all() {
    in_fresh_namespaces(|| {
        let mut kernel = Netlink::open().unwrap();
        kernel.commit(&foundation()).unwrap();
        assert!(kernel.commit(&foundation()).unwrap_err().is_exists());
        let mut transaction = add("verdicts", vec![Element::verdict(key(1), Verdict::Drop)], true);
        transaction.push(Command::DeleteElements { set: "targets".into(), keys: vec![key(9)] });
        let error = kernel.commit(&transaction).unwrap_err();
        assert!(error.is_not_found(), "{error}");
        assert!(error.to_string().contains("delete elements from ip test targets"), "{error}");
        assert_eq!(kernel.elements(&table(), "verdicts").unwrap(), Some(vec![]));
        assert!(
            kernel
                .commit(&add("verdicts", vec![Element::verdict(key(1), Verdict::Goto("nowhere".into()))], true))
                .is_err()
        );
    });
}

#[test]
fn an_element_is_replaced_within_one_transaction() {
    in_fresh_namespaces(|| {
        let mut kernel = Netlink::open().unwrap();
        kernel.commit(&foundation()).unwrap();
        kernel.commit(&add("verdicts", vec![Element::verdict(key(1), Verdict::Drop)], true)).unwrap();
        assert!(
            kernel
                .commit(&add("verdicts", vec![Element::verdict(key(1), Verdict::Accept)], false))
                .unwrap_err()
                .is_exists()
        );
        let mut replace = Transaction::new(table());
        replace.push(Command::DeleteElements { set: "verdicts".into(), keys: vec![key(1)] });
        replace.commands.extend(add("verdicts", vec![Element::verdict(key(1), Verdict::Accept)], true).commands);
        kernel.commit(&replace).unwrap();
        let elements = kernel.elements(&table(), "verdicts").unwrap().unwrap();
        assert_eq!(elements[0].value, Some(Value::Verdict(Verdict::Accept)));
    });
}

#[test]
fn elements_expire_after_their_timeout() {
    in_fresh_namespaces(|| {
        let mut kernel = Netlink::open().unwrap();
        kernel.commit(&foundation()).unwrap();
        let address = Key::single([10, 0, 0, 1].into());
        let element = Element { timeout: Some(Duration::from_secs(30)), ..Element::key(address) };
        kernel.commit(&add("seen", vec![element], true)).unwrap();
        let found = kernel.elements(&table(), "seen").unwrap().unwrap();
        assert_eq!(found[0].key, address);
        assert!(
            found[0].timeout.is_some_and(|left| left > Duration::from_secs(20) && left <= Duration::from_secs(30)),
            "{found:?}"
        );
    });
}

#[test]
fn a_hundred_thousand_elements_go_in_one_transaction_and_come_back() {
    in_fresh_namespaces(|| {
        let mut kernel = Netlink::open().unwrap();
        let elements: Vec<Element> =
            (0..100_000).map(|number| Element::verdict(key(number), Verdict::Goto("there".into()))).collect();
        let mut transaction = foundation();
        transaction.commands.extend(add("verdicts", elements, true).commands);
        let started = Instant::now();
        kernel.commit(&transaction).unwrap();
        let written = started.elapsed();
        assert_eq!(kernel.elements(&table(), "verdicts").unwrap().unwrap().len(), 100_000);
        eprintln!("100,000 elements: written in {written:?}, read in {:?}", started.elapsed() - written);
        let again: Vec<Element> = (0..100_000).map(|number| Element::verdict(key(number), Verdict::Drop)).collect();
        let error = kernel.commit(&add("verdicts", again, true)).unwrap_err();
        assert!(error.is_exists(), "very many refusals are told too: {error}");
        assert_eq!(kernel.generation().unwrap(), kernel.generation().unwrap());
    });
}
