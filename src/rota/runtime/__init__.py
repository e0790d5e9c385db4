"""The drivers: they stamp facts with the time, feed machines, keep the journal and carry commands out."""
